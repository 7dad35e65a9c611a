# METADATA
# title: Authorization
# description: |
#   Entry point: `data.edgewarden.authz.decision`. Deny by default.
#
#   1. `allow` has one row per action, which names every check that the action must pass.
#   2. A check is a conjunction of positive statements about the input. What is absent, or of the wrong type, leaves it
#      undefined, and that denies. A negation asks only for an option that the policy data leaves out, or about a member
#      that a statement before it has shown to be there.
#   3. `reasons` explains a denial. It is computed only then and grants nothing.
#   4. A site adds denials of its own as `data.edgewarden.site.reasons`; it cannot add permissions.
#
#   Rules of other packages are named by their full path, and data is read into a variable once a rule: the embedded
#   engine evaluates a whole package for a rule that is reached through an import, and walks all rules at each mention
#   of `data`. Functions are imported.
package edgewarden.authz

# METADATA
# description: The decision, version 1.
# entrypoint: true
decision := {"allow": true, "reasons": [], "obligations": {"limit": limit, "receipt": false}} if {
	data.edgewarden.plain.ok
	not denied_by_site
	limit := data.limits["default"]
} else := {"allow": true, "reasons": [], "obligations": obligations} if {
	allow
	not denied_by_site
	obligations := data.edgewarden.obligations.granted
} else := {"allow": false, "reasons": sort(reasons), "obligations": {"receipt": false}}

allow if {
	input.action == "infer"
	data.edgewarden.rbac.ok
	data.edgewarden.model.ok
	data.edgewarden.trust.ok
	data.edgewarden.network.ok
	data.edgewarden.limits.ok
	data.edgewarden.obligations.granted
} else if {
	input.action == "metadata"
	data.edgewarden.rbac.ok
	data.edgewarden.network.ok
} else if {
	input.action == "export"
	data.edgewarden.rbac.ok
	data.edgewarden.model.ok
	data.edgewarden.trust.ok
	data.edgewarden.network.ok
} else if {
	input.action in {"load", "open"}
	data.edgewarden.rbac.ok
	data.edgewarden.model.ok
	data.edgewarden.trust.loadable
} else if {
	input.action == "unload"
	data.edgewarden.rbac.ok
} else if {
	data.edgewarden.rbac.administers
	data.edgewarden.rbac.ok
	data.edgewarden.network.ok
}

denied_by_site if some _ in data.edgewarden.site.reasons

# An absent member makes a rule undefined, which `not` then sees; inside a negated expression the engines differ.
action_known if {
	input.action in {"infer", "metadata", "load", "unload", "export", "open"}
} else if {
	data.edgewarden.rbac.administers
}

nodes_own if input.action in {"load", "unload", "open"}

reasons contains "action_unknown" if not action_known

reasons contains reason if some reason in data.edgewarden.site.reasons

reasons contains reason if some reason in data.edgewarden.rbac.reasons

reasons contains reason if {
	input.action in {"infer", "export", "load", "open"}
	some reason in data.edgewarden.model.reasons
}

reasons contains reason if {
	input.action in {"infer", "export", "load", "open"}
	some reason in data.edgewarden.trust.reasons
}

reasons contains reason if {
	not nodes_own
	some reason in data.edgewarden.network.reasons
}

reasons contains reason if {
	input.action == "infer"
	some reason in data.edgewarden.limits.reasons
}

reasons contains reason if {
	input.action == "infer"
	some reason in data.edgewarden.obligations.reasons
}
