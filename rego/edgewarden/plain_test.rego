package edgewarden.plain_test

import data.edgewarden.authz
import data.edgewarden.fixtures
import data.edgewarden.plain

test_the_common_request_is_plain if {
	plain.ok with input as fixtures.infer
	affirmed := object.union(fixtures.infer, {"node": {"trust": "affirming", "attested_age_s": 60}})
	plain.ok with input as affirmed with data.node.enrolled as true
}

# Allowed, and left to the general row.
test_what_has_conditions_is_not_plain if {
	every request in [
		fixtures.metadata,
		fixtures.set(fixtures.infer, "/subject/roles", ["visitor"]),
	] {
		not plain.ok with input as request
	}
	every address in ["::ffff:10.20.1.7", "::ffff:a14:107"] {
		not plain.ok with input as fixtures.set(fixtures.infer, "/request/source_ip", address)
	}
	not plain.ok with input as fixtures.infer with data.models.models as {"surface-defects": {"receipt": true}}
	authz.decision.allow with input as fixtures.infer with data.models.models as {"surface-defects": {"receipt": true}}
}

test_it_gives_the_obligations_of_the_general_row if {
	authz.decision.obligations == data.edgewarden.obligations.granted with input as fixtures.infer
}
