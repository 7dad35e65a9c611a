package edgewarden.model_test

import data.edgewarden.fixtures
import data.edgewarden.model

reasons(path, value) := found if {
	found := model.reasons with input as fixtures.set(fixtures.infer, path, value)
}

listed(entry) := {"surface-defects": entry}

test_a_measured_and_signed_model_is_used if {
	model.ok with input as fixtures.infer
	model.reasons == set() with input as fixtures.infer
}

test_a_model_is_named if {
	every name in ["", null, 1, [], {}] {
		reasons("/resource/model", name) == {"model_unknown"}
	}
}

test_an_unlisted_model_may_be_refused if {
	reasons := model.reasons with input as fixtures.infer with data.models.unlisted as "deny"
	reasons == {"model_unknown"}
	model.ok with input as fixtures.infer
		with data.models.unlisted as "deny"
		with data.models.models as listed({"signers": "any-trusted"})
}

test_a_model_is_measured if {
	every measured in [false, null, "true", 1] {
		reasons("/resource/measured", measured) == {"model_not_measured"}
	}
	model.reasons == {"model_not_measured"} with input as fixtures.drop(fixtures.infer, "/resource/measured")
}

test_a_model_is_signed if {
	every signer in ["", "4bf5", null, 64, []] {
		"signer_not_trusted" in reasons("/resource/signer", signer)
	}
	model.reasons == {"signer_not_trusted"} with input as fixtures.drop(fixtures.infer, "/resource/signer")
}

test_signers_may_be_named if {
	model.ok with input as fixtures.infer with data.models.defaults.signers as [fixtures.signer]
	other := ["0000000000000000000000000000000000000000000000000000000000000000"]
	reasons := model.reasons with input as fixtures.infer with data.models.defaults.signers as other
	reasons == {"signer_not_trusted"}
}

test_a_models_own_signers_replace_the_defaults if {
	model.ok with input as fixtures.infer
		with data.models.defaults.signers as []
		with data.models.models as listed({"signers": [fixtures.signer]})
	not model.ok with input as fixtures.infer with data.models.models as listed({"signers": []})
}

test_a_digest_may_be_pinned if {
	model.ok with input as fixtures.infer with data.models.models as listed({"digests": [fixtures.digest]})
	reasons := model.reasons with input as fixtures.infer with data.models.models as listed({"digests": ["00"]})
	reasons == {"digest_not_allowed"}
	unstated := fixtures.drop(fixtures.infer, "/resource/digest")
	not model.ok with input as unstated with data.models.models as listed({"digests": [fixtures.digest]})
}

test_a_second_factor_is_demanded_by_sensitivity if {
	request := fixtures.set(fixtures.infer, "/resource/sensitivity", "restricted")
	model.reasons == {"mfa_required"} with input as request
	model.ok with input as fixtures.set(request, "/subject/mfa", true)
}

test_a_second_factor_is_demanded_by_model if {
	reasons := model.reasons with input as fixtures.infer with data.models.models as listed({"mfa": true})
	reasons == {"mfa_required"}
	request := fixtures.set(fixtures.infer, "/subject/mfa", true)
	model.ok with input as request with data.models.models as listed({"mfa": true})
}

night := {"night": {"days": ["Tuesday"], "from": "22:00", "to": "24:00"}}

test_a_model_is_used_within_its_windows if {
	reasons := model.reasons with input as fixtures.infer
		with data.windows.definitions as night
		with data.windows.models as {"surface-defects": ["night"]}
	reasons == {"outside_time_window"}
	model.ok with input as fixtures.set(fixtures.infer, "/request/time", "2026-03-03T22:30:00Z")
		with data.windows.definitions as night
		with data.windows.models as {"surface-defects": ["night"]}
}

test_the_node_loads_at_any_time_and_without_a_second_factor if {
	model.ok with input as fixtures.load
		with data.models.models as listed({"mfa": true, "sensitivity": "restricted"})
		with data.windows.definitions as night
		with data.windows.models as {"surface-defects": ["night"]}
}
