# METADATA
# title: Obligations
# description: |
#   What the enforcing side must do with an allowed request. A member that is absent leaves the choice to the model's
#   signed manifest; a profile that the policy names but does not define leaves the obligations undefined, which denies.
package edgewarden.obligations

granted := obligations if {
	input.action == "infer"
	models := data.models
	entry := object.get(models.models, input.resource.model, {})
	level := models.sensitivity[data.edgewarden.sensitivity.name]
	obligations := object.union(
		profiles(entry, level),
		{"limit": data.edgewarden.limits.name, "receipt": receipt(entry, level)},
	)
} else := obligations if {
	input.action in {"metadata", "export"}
	obligations := {"limit": data.edgewarden.limits.name, "receipt": false}
} else := {"receipt": false} if {
	input.action != "infer"
}

# The profiles that the policy names: for the model, else for its sensitivity.
profiles(entry, level) := {} if {
	not entry.sanitizer
	not entry.output
	not level.output
} else := chosen if {
	chosen := {member: profile |
		some member, profile in {
			"sanitize": object.get(entry, "sanitizer", null),
			"output": object.get(entry, "output", object.get(level, "output", null)),
		}
		profile != null
	}
	defined(chosen, "sanitize", data.sanitizers.profiles)
	defined(chosen, "output", data.outputs.profiles)
}

defined(chosen, member, known) if {
	not chosen[member]
} else if {
	known[chosen[member]]
}

receipt(entry, level) := true in {object.get(entry, "receipt", false), object.get(level, "receipt", false)}

# The rest explains a denial.

reasons contains "profile_undefined" if {
	models := data.models
	entry := object.get(models.models, input.resource.model, {})
	level := models.sensitivity[data.edgewarden.sensitivity.name]
	not profiles(entry, level)
}
