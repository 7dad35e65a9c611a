package edgewarden.limits_test

import data.edgewarden.authz
import data.edgewarden.fixtures
import data.edgewarden.limits

reasons(path, value) := found if {
	found := limits.reasons with input as fixtures.set(fixtures.infer, path, value)
}

metered := {"surface-defects": {"limit": "metered"}}

test_a_small_request_fits if {
	limits.ok with input as fixtures.infer
	limits.reasons == set() with input as fixtures.infer
}

test_bytes_are_limited if {
	largest := data.limits.limits.standard.max_bytes
	reasons("/request/bytes", largest) == set()
	reasons("/request/bytes", largest + 1) == {"request_too_large"}
	every bytes in [null, false, true, "1", [], {}, -1] {
		reasons("/request/bytes", bytes) == {"request_too_large"}
	}
	limits.reasons == {"request_too_large"} with input as fixtures.drop(fixtures.infer, "/request/bytes")
}

test_the_batch_is_limited if {
	largest := data.limits.limits.standard.max_batch
	reasons("/request/batch", largest) == set()
	reasons("/request/batch", largest + 1) == {"batch_too_large"}
	every batch in [null, false, true, "1", [], {}, 0, -1, 0.5] {
		reasons("/request/batch", batch) == {"batch_too_large"}
	}
	limits.reasons == {"batch_too_large"} with input as fixtures.drop(fixtures.infer, "/request/batch")
}

test_a_lifetime_budget_ends if {
	limits.ok with input as fixtures.set(fixtures.infer, "/request/budget_left", 1) with data.models.models as metered
	every left in [0, -1, null, true, "5", 1e9] {
		spent := fixtures.set(fixtures.infer, "/request/budget_left", left)
		found := limits.reasons with input as spent with data.models.models as metered
		found == {"budget_exhausted"}
	}
	not limits.ok with input as fixtures.infer with data.models.models as metered
}

test_a_limit_may_bound_the_anomaly_score if {
	every value in [0, 0.4, 0.5] {
		request := fixtures.set(fixtures.infer, "/request/anomaly", value)
		limits.ok with input as request with data.limits.limits.standard.max_anomaly as 0.5
	}
	every value in [0.51, 1, null, "0", -0.1] {
		request := fixtures.set(fixtures.infer, "/request/anomaly", value)
		found := limits.reasons with input as request with data.limits.limits.standard.max_anomaly as 0.5
		found == {"input_anomalous"}
	}
	not limits.ok with input as fixtures.infer with data.limits.limits.standard.max_anomaly as 0
}

test_the_subjects_own_limit_comes_first if {
	limits.name == "bulk" with input as fixtures.infer
		with data.limits.subjects as {"mtls": {"press-12": "bulk"}}
		with data.models.models as metered
}

test_then_the_models if {
	limits.name == "metered" with input as fixtures.infer
		with data.models.models as metered
		with data.limits.roles as {"operator": "bulk"}
}

test_then_the_most_generous_of_the_granting_roles if {
	request := fixtures.set(fixtures.infer, "/subject/roles", ["operator", "analyst", "line"])
	definitions := object.union(
		data.roles.definitions,
		{"line": {"grants": {"infer": {"models": ["*"], "sensitivity": "internal"}}}},
	)
	limits.name == "standard" with input as request
		with data.roles as fixtures.roles(definitions)
		with data.limits.roles as {"operator": "metered", "line": "standard", "analyst": "bulk"}
}

test_else_the_default if {
	limits.name == "standard" with input as fixtures.infer
}

test_a_limit_that_is_not_defined_denies if {
	decision := authz.decision with input as fixtures.infer with data.limits["default"] as "missing"
	decision.allow == false
	"limit_undefined" in decision.reasons
}
