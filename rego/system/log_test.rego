package edgewarden.log_test

import data.edgewarden.fixtures
import data.system.log

test_token_claims_are_masked if {
	claims := {"email": "ada@plant.example", "groups": ["ml-operations"]}
	entry := {"input": fixtures.set(fixtures.infer, "/subject/claims", claims)}
	log.mask == {"/input/subject/claims"} with input as entry
}

test_nothing_else_is_masked if {
	log.mask == set() with input as {"input": fixtures.drop(fixtures.infer, "/subject/claims")}
}
