# METADATA
# title: Who may do what at the controller
# description: |
#   Entry point: `data.edgewarden.authz.decision`. Deny by default. A role may do what its row lists and what the roles below it may.
package edgewarden.authz

decision := {"allow": true, "reasons": [], "obligations": {"receipt": false}} if {
	some role in input.subject.roles
	some action in permitted[role]
	action == input.action
} else := {"allow": false, "reasons": ["role"], "obligations": {"receipt": false}}

viewer := {"node.list", "node.show", "node.watch", "reference.list", "token.list", "admin.list", "audit.read", "hook.list", "hook.show"}

operator := {"node.release", "node.poll", "node.interval", "token.create", "token.revoke", "hook.create", "hook.delete", "hook.test"}

approver := {"reference.approve", "reference.withdraw", "admin.create", "admin.revoke"}

permitted := {
	"viewer": viewer,
	"operator": viewer | operator,
	"approver": (viewer | operator) | approver,
}
