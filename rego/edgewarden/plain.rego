# METADATA
# title: The plain inference
# description: |
#   The common request in one rule: a role without conditions, a model and a subject of which the policy
#   says nothing of their own. It is here for speed alone (the embedded engine pays for each rule and each function),
#   and grants nothing that the row `infer` of `authz` would not: the tests compare both on every generated input.
#   Whatever it does not recognise as plain falls through to that row. A rule that tightens another package must
#   tighten this one, or delete this file: `authz` works without it.
package edgewarden.plain

import data.edgewarden.network
import data.edgewarden.trust

# A rule without a value of its own ends at the first network that matches. The limit is the default one.
ok if {
	input.action == "infer"
	subject := input.subject
	resource := input.resource

	# 1. The subject is known, and one of its roles grants every model up to this sensitivity, without conditions.
	roles := data.roles
	subject.kind in {"mtls", "jwt", "spiffe"}
	is_string(subject.id)
	subject.id != ""
	not roles.suspended[subject.kind][subject.id]
	models := data.models
	level := models.sensitivity[resource.sensitivity]
	is_array(subject.roles)
	some role in subject.roles
	definition := roles.definitions[role]
	not definition.only
	grant := definition.grants.infer
	not grant.mfa
	"*" in grant.models
	level.rank <= models.sensitivity[grant.sensitivity].rank

	# 2. The model is measured, signed by a trusted key, and not listed; its sensitivity demands nothing.
	is_string(resource.model)
	resource.model != ""
	resource.measured == true
	is_string(resource.signer)
	count(resource.signer) == 64
	models.unlisted == "allow"
	models.defaults.signers == "any-trusted"
	not models.models[resource.model]
	not level.mfa
	not level.output
	not level.receipt

	# 3. Neither the role nor the model has time windows.
	windows := data.windows
	not windows.roles[role]
	not windows.models[resource.model]

	# 4. The node serves this sensitivity.
	node := data.node
	level.rank <= models.sensitivity[node.serves[input.node.trust]].rank
	trust.current(node, resource.sensitivity)

	# 5. The peer's address is in an allowed network; inference has no networks of its own and none is denied.
	networks := data.network
	not networks.actions.infer
	networks["default"].deny == []
	network.is_address(input.request.source_ip)
	some cidr in networks["default"].allow
	net.cidr_contains(cidr, input.request.source_ip)

	# 6. The request is within the default limit, which bounds no more than size; nobody has a limit of their own.
	limits := data.limits
	limits.roles == {}
	not limits.subjects[subject.kind][subject.id]
	bound := limits.limits[limits["default"]]
	0 <= input.request.bytes
	input.request.bytes <= bound.max_bytes
	1 <= input.request.batch
	input.request.batch <= bound.max_batch
	not bound.lifetime_budget
	not bound.max_anomaly
}
