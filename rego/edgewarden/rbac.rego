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
	policy := data.roles
	active(policy)
	is_array(input.subject.roles)
	some role in input.subject.roles
	permits(policy, role)
} else if {
	policy := data.roles
	active(policy)
	some role in bound(policy)
	permits(policy, role)
}

active(policy) if {
	input.subject.kind in {"mtls", "jwt", "spiffe", "unix"}
	is_string(input.subject.id)
	input.subject.id != ""
	not policy.suspended[input.subject.kind][input.subject.id]
}

administers if {
	is_string(input.action)
	startswith(input.action, "admin.")
	input.action != "admin."
}

bound(policy) := {role |
	some role in policy.bindings.subjects[input.subject.kind][input.subject.id]
} | {role |
	some claim, values in policy.bindings.claims
	some role in claimed(input.subject.claims[claim], values)
}

# A claim holds one value or a list of them, as `groups` does.
claimed(value, values) := values[value] if is_string(value)

claimed(list, values) := [role | some value in list; some role in values[value]] if is_array(list)

permits(policy, role) if {
	definition := policy.definitions[role]
	grant := definition.grants[input.action]
	applies(role, grant)
	fulfils(role, definition, grant)
} else if {
	administers
	definition := policy.definitions[role]
	grant := definition.grants["admin.*"]
	fulfils(role, definition, grant)
}

# A model is a condition where its content, its description or its answers leave the node.
applies(role, grant) if {
	input.action in {"infer", "export", "metadata"}
	models := data.models
	names(grant, input.resource.model)
	admits(models.models, input.resource.model, role)
	models.sensitivity[data.edgewarden.sensitivity.name].rank <= models.sensitivity[grant.sensitivity].rank
} else if {
	not model_scoped
}

# A pattern is a name, or the beginning of one followed by `*`.
names(grant, model) if {
	"*" in grant.models
	model != ""
	is_string(model)
} else if {
	model in grant.models
	model != ""
	is_string(model)
} else if {
	is_string(model)
	model != ""
	some pattern in grant.models
	endswith(pattern, "*")
	startswith(model, trim_suffix(pattern, "*"))
}

# A model that lists its roles admits no other.
admits(models, model, role) if {
	not models[model].roles
} else if {
	role in models[model].roles
}

model_scoped if input.action in {"infer", "export"}

# Metadata without a resource is the server's own: its name, version and extensions.
model_scoped if {
	input.action == "metadata"
	_ := input.resource
}

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

# The rest explains a denial, but for `granting`, by which limits choose.

roles contains role if {
	is_array(input.subject.roles)
	some role in input.subject.roles
}

roles contains role if some role in bound(data.roles)

granting contains role if {
	some role in roles
	permits(data.roles, role)
}

subject_known if {
	input.subject.kind in {"mtls", "jwt", "spiffe", "unix"}
	is_string(input.subject.id)
	input.subject.id != ""
}

suspended if data.roles.suspended[input.subject.kind][input.subject.id]

reasons contains "subject_unknown" if not subject_known

reasons contains "subject_suspended" if {
	subject_known
	suspended
}

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
	grant := definition.grants[input.action]
}

grants contains [role, grant] if {
	administers
	some role in roles
	definition := data.roles.definitions[role]
	holds(definition)
	grant := definition.grants["admin.*"]
}

named contains [role, grant] if {
	some [role, grant] in grants
	names(grant, input.resource.model)
	admits(data.models.models, input.resource.model, role)
}

named contains [role, grant] if {
	some [role, grant] in grants
	not model_scoped
}

reached contains [role, grant] if {
	some [role, grant] in named
	applies(role, grant)
}

opened contains [role, grant] if {
	some [role, grant] in reached
	windows.role_open(role)
}
