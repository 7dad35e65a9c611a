package edgewarden.obligations_test

import data.edgewarden.authz
import data.edgewarden.fixtures

obligations(request) := found if {
	found := authz.decision.obligations with input as request
}

entry := {"sanitizer": "image-dct", "output": "top-5", "receipt": true, "limit": "bulk"}

test_what_the_policy_leaves_out_is_the_manifests if {
	obligations(fixtures.infer) == {"limit": "standard", "receipt": false}
}

test_the_policy_overrides_for_a_model if {
	decision := authz.decision with input as fixtures.infer with data.models.models as {"surface-defects": entry}
	decision.obligations == {"sanitize": "image-dct", "output": "top-5", "limit": "bulk", "receipt": true}
}

test_a_sensitivity_may_demand_an_output_and_a_receipt if {
	every case in [
		["confidential", {"limit": "standard", "receipt": true}],
		["restricted", {"output": "top-1", "limit": "standard", "receipt": true}],
	] {
		request := fixtures.set(fixtures.set(fixtures.infer, "/resource/sensitivity", case[0]), "/subject/mfa", true)
		decision := authz.decision with input as request
			with data.roles.definitions.operator.grants.infer.sensitivity as "restricted"
		decision.allow
		decision.obligations == case[1]
	}
}

test_the_models_output_comes_before_its_sensitivitys if {
	request := fixtures.set(fixtures.set(fixtures.infer, "/resource/sensitivity", "restricted"), "/subject/mfa", true)
	decision := authz.decision with input as request
		with data.roles.definitions.operator.grants.infer.sensitivity as "restricted"
		with data.models.models as {"surface-defects": {"output": "rounded"}}
	decision.obligations.output == "rounded"
}

test_a_profile_that_is_not_defined_denies if {
	every broken in [{"sanitizer": "missing"}, {"output": "missing"}] {
		decision := authz.decision with input as fixtures.infer with data.models.models as {"surface-defects": broken}
		decision.allow == false
		decision.reasons == ["profile_undefined"]
		decision.obligations == {"receipt": false}
	}
}

test_metadata_is_limited_and_nothing_else if {
	decision := authz.decision with input as fixtures.metadata with data.models.models as {"surface-defects": entry}
	decision.obligations == {"limit": "bulk", "receipt": false}
}

test_the_node_and_its_admins_owe_nothing if {
	obligations(fixtures.load) == {"receipt": false}
	obligations(fixtures.admin) == {"receipt": false}
}
