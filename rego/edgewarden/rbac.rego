# METADATA
# title: Roles
# description: |
#   1. A subject is known by kind and id, and is not suspended.
#   2. Its roles are those that its credential carries and those that `data.roles.bindings` adds.
#   3. One of its roles must grant the action, for this model, at this sensitivity.
#   4. The role and its grant may have conditions: a subject that alone may hold the role (`only`: a certificate cannot
#      name itself the node), time windows, a second factor.
package edgewarden.rbac

import data.edgewarden.windows

ok if {
	subject_known
	not suspended
	some role in roles
	permits(role)
}

subject_known if {
	input.subject.kind in {"mtls", "jwt", "spiffe", "unix"}
	is_string(input.subject.id)
	input.subject.id != ""
}

# Looked up by kind and id: read it only after `subject_known`.
suspended if data.roles.suspended[input.subject.kind][input.subject.id]

administers if {
	is_string(input.action)
	startswith(input.action, "admin.")
	input.action != "admin."
}

roles contains role if {
	is_array(input.subject.roles)
	some role in input.subject.roles
}

roles contains role if some role in data.roles.bindings.subjects[input.subject.kind][input.subject.id]

roles contains role if {
	some claim, bound in data.roles.bindings.claims
	some role in claimed(input.subject.claims[claim], bound)
}

# A claim holds one value or a list of them, as `groups` does.
claimed(value, bound) := bound[value] if is_string(value)

claimed(values, bound) := [role | some value in values; some role in bound[value]] if is_array(values)

permits(role) if {
	definition := data.roles.definitions[role]
	grant := granted(definition)
	covers(role, grant)
	fulfils(role, definition, grant)
}

granted(definition) := value if {
	value := definition.grants[input.action]
} else := value if {
	administers
	value := definition.grants["admin.*"]
}

# A model is a condition where its content, its description or its answers leave the node.
covers(role, grant) if {
	input.action in {"infer", "export", "metadata"}
	names(role, grant)
	reaches(grant)
} else if {
	input.action == "metadata"
	not input_resource
} else if {
	input.action in {"load", "unload", "open"}
} else if {
	administers
}

# Metadata without a resource is the server's own: its name, version and extensions.
input_resource if {
	_ := input.resource
}

# A model that lists its roles admits no other. A pattern is a name, or the beginning of one followed by `*`.
names(role, grant) if {
	is_string(input.resource.model)
	input.resource.model != ""
	some pattern in grant.models
	matches(pattern, input.resource.model)
	admits(role, data.models.models[input.resource.model])
} else if {
	is_string(input.resource.model)
	input.resource.model != ""
	some pattern in grant.models
	matches(pattern, input.resource.model)
	not data.models.models[input.resource.model]
}

matches(pattern, model) if {
	pattern in {"*", model}
} else if {
	endswith(pattern, "*")
	startswith(model, trim_suffix(pattern, "*"))
}

admits(role, entry) if {
	not entry.roles
} else if {
	role in entry.roles
}

reaches(grant) if data.edgewarden.sensitivity.rank <= data.models.sensitivity[grant.sensitivity].rank

# Most roles and grants have no condition.
fulfils(role, definition, grant) if {
	not definition.only
	not grant.mfa
	windows.role_open(role)
} else if {
	holds(definition)
	authenticated(grant)
	windows.role_open(role)
}

holds(definition) if {
	not definition.only
} else if {
	definition.only.kind == input.subject.kind
	definition.only.id == input.subject.id
}

authenticated(grant) if {
	not grant.mfa
} else if {
	input.subject.mfa == true
}

# The roles by which the request is granted.
granting contains role if {
	some role in roles
	permits(role)
}

reasons contains "subject_unknown" if not subject_known

reasons contains "subject_suspended" if suspended

reasons contains word if {
	count(grants) == 0
	word := {
		"infer": "role_may_not_infer",
		"metadata": "role_may_not_read_metadata",
		"load": "role_may_not_load",
		"unload": "role_may_not_unload",
		"export": "role_may_not_export",
		"open": "role_may_not_open",
	}[input.action]
}

reasons contains "role_may_not_administer" if {
	administers
	count(grants) == 0
}

# Why a subject with grants for the action has none that fits: the first condition that none of them passes.
reasons contains "model_not_granted" if {
	count(grants) > 0
	count(named) == 0
}

reasons contains "sensitivity_not_granted" if {
	count(named) > 0
	count(reached) == 0
}

reasons contains "outside_time_window" if {
	count(reached) > 0
	count(opened) == 0
}

reasons contains "mfa_required" if {
	count(opened) > 0
	count(granting) == 0
}

grants contains [role, grant] if {
	some role in roles
	definition := data.roles.definitions[role]
	holds(definition)
	grant := granted(definition)
}

named contains [role, grant] if {
	some [role, grant] in grants
	names(role, grant)
}

named contains [role, grant] if {
	some [role, grant] in grants
	not model_scoped
}

reached contains [role, grant] if {
	some [role, grant] in named
	covers(role, grant)
}

opened contains [role, grant] if {
	some [role, grant] in reached
	windows.role_open(role)
}

model_scoped if input.action in {"infer", "export"}

model_scoped if {
	input.action == "metadata"
	input_resource
}
