package edgewarden.sensitivity_test

import data.edgewarden.fixtures
import data.edgewarden.sensitivity

test_the_manifest_states_it if {
	sensitivity.name == "internal" with input as fixtures.infer
}

test_the_policy_overrides_the_manifest if {
	sensitivity.name == "confidential" with input as fixtures.infer
		with data.models.models as {"surface-defects": {"sensitivity": "confidential"}}
}

test_what_is_not_stated_is_restricted if {
	sensitivity.name == "restricted" with input as fixtures.drop(fixtures.infer, "/resource/sensitivity")
}

test_levels_are_ranked if {
	ranks := [rank |
		some name in ["public", "internal", "confidential", "restricted"]
		rank := data.models.sensitivity[name].rank
	]
	ranks == [0, 1, 2, 3]
}
