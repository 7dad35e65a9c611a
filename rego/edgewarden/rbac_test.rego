package edgewarden.rbac_test

import data.edgewarden.authz
import data.edgewarden.fixtures
import data.edgewarden.rbac

reasons(path, value) := found if {
	found := rbac.reasons with input as fixtures.set(fixtures.infer, path, value)
}

test_an_unknown_kind_of_subject_is_denied if {
	reasons("/subject/kind", "x509") == {"subject_unknown"}
	reasons("/subject/kind", null) == {"subject_unknown"}
}

test_a_subject_without_id_is_denied if {
	reasons("/subject/id", "") == {"subject_unknown"}
	reasons("/subject/id", 12) == {"subject_unknown"}
}

test_a_suspended_subject_is_denied if {
	suspended := {"mtls": {"press-12": "key lost"}}
	decision := authz.decision with input as fixtures.infer with data.roles.suspended as suspended
	decision.reasons == ["subject_suspended"]
}

test_suspension_holds_for_one_kind_of_credential if {
	authz.decision.allow with input as fixtures.infer with data.roles.suspended as {"jwt": {"press-12": "left"}}
}

test_each_action_has_its_word if {
	words := {
		"infer": "role_may_not_infer",
		"metadata": "role_may_not_read_metadata",
		"load": "role_may_not_load",
		"unload": "role_may_not_unload",
		"export": "role_may_not_export",
		"open": "role_may_not_open",
		"admin.policy.activate": "role_may_not_administer",
	}
	every action, word in words {
		request := object.union(fixtures.infer, {"action": action, "subject": {"roles": ["visitor"]}})
		rbac.reasons == {word} with input as request
	}
}

test_an_operator_reaches_internal_models_only if {
	every sensitivity in ["public", "internal"] {
		reasons("/resource/sensitivity", sensitivity) == set()
	}
	every sensitivity in ["confidential", "restricted", "secret", "", null, 1] {
		reasons("/resource/sensitivity", sensitivity) == {"sensitivity_not_granted"}
	}
}

test_an_analyst_tries_public_models_and_reads_all_metadata if {
	analyst := fixtures.set(fixtures.infer, "/subject/roles", ["analyst"])
	rbac.reasons == {"sensitivity_not_granted"} with input as analyst
	rbac.ok with input as fixtures.set(analyst, "/resource/sensitivity", "public")
	rbac.ok with input as fixtures.set(analyst, "/action", "metadata")
}

test_an_admin_asks_no_model if {
	request := fixtures.set(fixtures.infer, "/subject/roles", ["admin"])
	rbac.reasons == {"role_may_not_infer"} with input as request
}

test_admin_verbs_are_granted_one_by_one_or_all if {
	definitions := {"auditor": {"grants": {"admin.status": {}}}}
	request := fixtures.set(fixtures.admin, "/subject/roles", ["auditor"])
	rbac.ok with input as request with data.roles as fixtures.roles(definitions)
	activate := fixtures.set(request, "/action", "admin.policy.activate")
	not rbac.ok with input as activate with data.roles as fixtures.roles(definitions)
	rbac.ok with input as fixtures.set(fixtures.admin, "/action", "admin.policy.activate")
}

test_the_wildcard_of_admin_verbs_is_no_verb_of_others if {
	every action in ["admin.", "admin", "adminx"] {
		not rbac.ok with input as fixtures.set(fixtures.admin, "/action", action)
	}
}

test_the_node_role_is_reserved_for_the_node if {
	every case in [["/subject/kind", "mtls"], ["/subject/id", "someone"]] {
		request := fixtures.set(fixtures.load, case[0], case[1])
		rbac.reasons == {"role_may_not_load"} with input as request
	}
	rbac.ok with input as fixtures.load
}

test_roles_are_bound_to_a_subject_of_one_kind if {
	bindings := {"mtls": {"press-12": ["operator"]}}
	bare := fixtures.set(fixtures.infer, "/subject/roles", [])
	rbac.ok with input as bare with data.roles.bindings.subjects as bindings
	rbac.ok with input as fixtures.drop(fixtures.infer, "/subject/roles") with data.roles.bindings.subjects as bindings
	token := fixtures.set(bare, "/subject/kind", "jwt")
	not rbac.ok with input as token with data.roles.bindings.subjects as bindings
}

test_roles_are_bound_to_a_claim if {
	bindings := {"groups": {"ml-operations": ["operator"]}}
	bare := fixtures.set(fixtures.infer, "/subject/roles", [])
	every claims in [{"groups": "ml-operations"}, {"groups": ["staff", "ml-operations"]}] {
		request := fixtures.set(bare, "/subject/claims", claims)
		rbac.ok with input as request with data.roles.bindings.claims as bindings
	}
	every claims in [{}, {"groups": "staff"}, {"groups": ["staff"]}, {"groups": 7}, {"groups": {"a": "ml-operations"}}, {"team": "ml-operations"}] {
		request := fixtures.set(bare, "/subject/claims", claims)
		not rbac.ok with input as request with data.roles.bindings.claims as bindings
	}
}

limited(grant) := {"operator": {"grants": {"infer": grant, "metadata": grant}}}

test_a_grant_names_models_or_their_beginning if {
	every pattern in ["*", "surface-defects", "surface-*", "surface-defects*"] {
		definitions := limited({"models": [pattern], "sensitivity": "internal"})
		rbac.ok with input as fixtures.infer with data.roles as fixtures.roles(definitions)
	}
	every pattern in ["", "surface", "defects", "*defects", "Surface-*", "surface-defects-2*"] {
		definitions := limited({"models": ["other", pattern], "sensitivity": "internal"})
		reasons := rbac.reasons with input as fixtures.infer with data.roles as fixtures.roles(definitions)
		reasons == {"model_not_granted"}
	}
}

test_a_grant_without_models_grants_none if {
	definitions := limited({"sensitivity": "internal"})
	not rbac.ok with input as fixtures.infer with data.roles as fixtures.roles(definitions)
	not rbac.ok with input as fixtures.metadata with data.roles as fixtures.roles(definitions)
}

test_a_grant_without_sensitivity_grants_none if {
	definitions := limited({"models": ["*"]})
	not rbac.ok with input as fixtures.infer with data.roles as fixtures.roles(definitions)
}

test_a_model_may_name_its_roles if {
	rbac.ok with input as fixtures.infer with data.models.models as {"surface-defects": {"roles": ["operator"]}}
	reasons := rbac.reasons with input as fixtures.infer
		with data.models.models as {"surface-defects": {"roles": ["quality"]}}
	reasons == {"model_not_granted"}
}

test_a_grant_may_demand_a_second_factor if {
	definitions := limited({"models": ["*"], "sensitivity": "internal", "mfa": true})
	reasons := rbac.reasons with input as fixtures.infer with data.roles as fixtures.roles(definitions)
	reasons == {"mfa_required"}
	every value in ["true", 1, null] {
		request := fixtures.set(fixtures.infer, "/subject/mfa", value)
		not rbac.ok with input as request with data.roles as fixtures.roles(definitions)
	}
	request := fixtures.set(fixtures.infer, "/subject/mfa", true)
	rbac.ok with input as request with data.roles as fixtures.roles(definitions)
}

test_a_role_counts_within_its_windows if {
	definitions := {"night": {"days": ["Tuesday"], "from": "22:00", "to": "24:00"}}
	reasons := rbac.reasons with input as fixtures.infer
		with data.windows.definitions as definitions
		with data.windows.roles as {"operator": ["night"]}
	reasons == {"outside_time_window"}
}

test_any_role_that_grants_is_enough if {
	request := fixtures.set(fixtures.infer, "/subject/roles", ["visitor", "analyst", "operator"])
	rbac.ok with input as request
}

test_metadata_without_resource_is_the_servers_own if {
	rbac.ok with input as fixtures.drop(fixtures.metadata, "/resource")
	not rbac.ok with input as fixtures.drop(fixtures.metadata, "/resource/model")
	every value in [null, false, "", {}, []] {
		not rbac.ok with input as fixtures.set(fixtures.metadata, "/resource", value)
	}
}
