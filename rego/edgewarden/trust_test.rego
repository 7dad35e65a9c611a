package edgewarden.trust_test

import data.edgewarden.fixtures
import data.edgewarden.trust

state(word, age) := object.union(fixtures.infer, {"node": {"trust": word, "attested_age_s": age}})

test_an_unknown_node_serves_while_it_is_not_enrolled if {
	trust.ok with input as fixtures.infer
	reasons := trust.reasons with input as fixtures.infer with data.node.enrolled as true
	reasons == {"node_not_trusted"}
}

test_enrolled_is_false_only_when_it_says_so if {
	every value in [null, "false", 0] {
		not trust.ok with input as fixtures.infer with data.node.enrolled as value
	}
}

test_an_affirmed_node_serves if {
	trust.ok with input as state("affirming", 60)
	trust.ok with input as state("affirming", 60) with data.node.enrolled as true
}

test_a_contraindicated_node_serves_nothing if {
	request := state("contraindicated", 0)
	trust.reasons == {"node_contraindicated"} with input as request
	not trust.ok with input as request with data.node as fixtures.node_serving({"contraindicated": "restricted"})
	not trust.loadable with input as request
}

test_a_node_without_result_serves_nothing_but_loads if {
	request := state("none", 0)
	trust.reasons == {"node_not_trusted"} with input as request
	not trust.ok with input as request with data.node as fixtures.node_serving({"none": "restricted"})
	trust.loadable with input as request
	trust.reasons == set() with input as object.union(request, {"action": "load"})
}

test_a_warned_node_serves_up_to_a_sensitivity if {
	trust.ok with input as state("warning", 60)
	request := fixtures.set(state("warning", 60), "/resource/sensitivity", "confidential")
	trust.reasons == {"node_not_trusted"} with input as request
	trust.ok with input as request with data.node.serves.warning as "confidential"
}

test_a_result_ages_by_sensitivity if {
	limit := data.node.max_attested_age_s.internal
	trust.ok with input as state("affirming", limit)
	trust.reasons == {"attestation_too_old"} with input as state("affirming", limit + 1)
	trust.ok with input as fixtures.set(state("affirming", limit + 1), "/resource/sensitivity", "public")
	not trust.ok with input as fixtures.set(state("affirming", limit), "/resource/sensitivity", "restricted")
}

test_an_age_that_is_absent_or_no_number_is_too_old if {
	every age in [null, true, "60", [], -1] {
		trust.reasons == {"attestation_too_old"} with input as state("affirming", age)
	}
	request := fixtures.set(fixtures.infer, "/node/trust", "affirming")
	trust.reasons == {"attestation_too_old"} with input as request
}

test_an_unknown_word_is_no_trust if {
	every word in ["", "AFFIRMING", null, true, ["affirming"]] {
		request := fixtures.set(fixtures.infer, "/node/trust", word)
		trust.reasons == {"node_not_trusted"} with input as request
		not trust.loadable with input as request
		loading := object.union(request, {"action": "load"})
		trust.reasons == {"node_not_trusted"} with input as loading
	}
}

test_a_state_that_is_not_served_denies if {
	not trust.ok with input as state("warning", 60) with data.node as fixtures.node_serving({"affirming": "restricted"})
}
