# METADATA
# title: Obligations
# description: |
#   What the enforcing side must do with an allowed request. A member that is absent leaves the choice to the model's
#   signed manifest; a profile that the policy names but does not define denies.
package edgewarden.obligations

granted := object.union(profiles, {"limit": data.edgewarden.limits.name, "receipt": receipt}) if {
	input.action == "infer"
} else := {"limit": data.edgewarden.limits.name, "receipt": false} if {
	input.action in {"metadata", "export"}
} else := {"receipt": false}

# The profiles that the policy names, for the model or for its sensitivity.
profiles["sanitize"] := data.models.models[input.resource.model].sanitizer

profiles["output"] := output

output := value if {
	value := data.models.models[input.resource.model].output
} else := data.edgewarden.sensitivity.level.output

receipt if {
	data.edgewarden.sensitivity.level.receipt
} else if {
	data.models.models[input.resource.model].receipt
} else := false

ok if {
	defined(profiles, "sanitize", data.sanitizers.profiles)
	defined(profiles, "output", data.outputs.profiles)
}

defined(named, member, known) if {
	not named[member]
} else if {
	known[named[member]]
}

reasons contains "profile_undefined" if not ok
