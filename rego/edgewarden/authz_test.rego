package edgewarden.authz_test

import data.edgewarden.authz
import data.edgewarden.fixtures

granting_export := {"operator": {"grants": {"export": {"models": ["*"], "sensitivity": "internal"}}}}

test_each_action_is_allowed_to_its_role if {
	every request in [fixtures.infer, fixtures.metadata, fixtures.admin, fixtures.load, fixtures.unload, fixtures.open] {
		authz.decision.allow with input as request
	}
}

test_an_allowed_decision_is_complete if {
	authz.decision == {
		"allow": true,
		"reasons": [],
		"obligations": {"limit": "standard", "receipt": false},
	} with input as fixtures.infer
}

test_a_denied_decision_is_complete if {
	request := fixtures.set(fixtures.infer, "/subject/roles", [])
	authz.decision == {
		"allow": false,
		"reasons": ["role_may_not_infer"],
		"obligations": {"receipt": false},
	} with input as request
}

test_reasons_are_sorted if {
	decision := authz.decision with input as {"action": "infer"}
	decision.allow == false
	decision.reasons == sort(decision.reasons)
	count(decision.reasons) > 5
}

test_no_role_may_export_until_one_is_granted if {
	decision := authz.decision with input as fixtures.export
	decision.reasons == ["role_may_not_export"]
	authz.decision.allow with input as fixtures.export with data.roles as fixtures.roles(granting_export)
}

test_export_passes_the_checks_of_inference if {
	every case in [
		["/node/trust", "contraindicated", "node_contraindicated"],
		["/resource/measured", false, "model_not_measured"],
		["/request/source_ip", "8.8.8.8", "source_not_allowed"],
	] {
		request := fixtures.set(fixtures.export, case[0], case[1])
		decision := authz.decision with input as request with data.roles as fixtures.roles(granting_export)
		decision.reasons == [case[2]]
	}
}

test_an_unknown_action_is_denied if {
	every action in ["", "INFER", "infer ", "admin", "admin.", "administer", "*", null, 7, ["infer"], {"infer": true}, true] {
		request := fixtures.set(fixtures.infer, "/action", action)
		decision := authz.decision with input as request
		decision.allow == false
		"action_unknown" in decision.reasons
	}
}

test_an_input_that_is_no_object_is_denied if {
	every document in [null, true, 0, "infer", [], {}, [fixtures.infer]] {
		decision := authz.decision with input as document
		decision.allow == false
		"action_unknown" in decision.reasons
	}
}

# What a request for inference cannot do without.
test_an_absent_member_denies if {
	every path in [
		"/action",
		"/subject",
		"/subject/id",
		"/subject/kind",
		"/subject/roles",
		"/resource",
		"/resource/model",
		"/resource/signer",
		"/resource/measured",
		"/resource/sensitivity",
		"/request",
		"/request/bytes",
		"/request/batch",
		"/request/source_ip",
		"/node",
		"/node/trust",
	] {
		request := fixtures.drop(fixtures.infer, path)
		decision := authz.decision with input as request
		decision.allow == false
		count(decision.reasons) > 0
	}
}

test_a_member_of_the_wrong_type_denies if {
	every path in [
		"/subject",
		"/subject/id",
		"/subject/kind",
		"/subject/roles",
		"/resource",
		"/resource/model",
		"/resource/signer",
		"/resource/measured",
		"/resource/sensitivity",
		"/request",
		"/request/bytes",
		"/request/batch",
		"/request/source_ip",
		"/node",
		"/node/trust",
	] {
		every value in [null, false, "", [], {}, ["visitor", 1], {"operator": "operator"}] {
			request := fixtures.set(fixtures.infer, path, value)
			decision := authz.decision with input as request
			decision.allow == false
			count(decision.reasons) > 0
		}
	}
}

test_a_load_needs_every_member if {
	every path in [
		"/subject/id",
		"/subject/kind",
		"/subject/roles",
		"/resource",
		"/resource/model",
		"/resource/signer",
		"/resource/measured",
		"/node",
		"/node/trust",
	] {
		request := fixtures.drop(fixtures.load, path)
		decision := authz.decision with input as request
		decision.allow == false
		count(decision.reasons) > 0
	}
}

test_a_site_adds_denials if {
	every request in [fixtures.infer, fixtures.metadata, fixtures.admin, fixtures.load] {
		decision := authz.decision with input as request with data.edgewarden.site.reasons as {"maintenance"}
		decision == {"allow": false, "reasons": ["maintenance"], "obligations": {"receipt": false}}
	}
	authz.decision.allow with input as fixtures.infer with data.edgewarden.site.reasons as set()
}
