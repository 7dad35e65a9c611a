# METADATA
# title: Trust
# description: |
#   1. A node serves models up to the sensitivity that `data.node.serves` gives its last Attestation Result.
#   2. An affirming or warning result counts for as long as the model's sensitivity allows.
#   3. `unknown` counts only while the node is not enrolled. `contraindicated` and `none` never count.
#   4. Loading answers nobody: a node that is not contraindicated may load, so that it is ready when its result comes.
package edgewarden.trust

ok if {
	policy := data.node
	serves(policy, input.node.trust)
	current(policy, data.edgewarden.sensitivity.name)
}

serves(policy, state) if {
	ranks := data.models.sensitivity
	ranks[data.edgewarden.sensitivity.name].rank <= ranks[policy.serves[state]].rank
}

current(policy, sensitivity) if {
	input.node.trust == "unknown"
	policy.enrolled == false
} else if {
	input.node.trust in {"affirming", "warning"}
	0 <= input.node.attested_age_s
	input.node.attested_age_s <= policy.max_attested_age_s[sensitivity]
}

loadable if input.node.trust in {"affirming", "warning", "none", "unknown"}

# The rest explains a denial.

reasons contains "node_contraindicated" if contraindicated

reasons contains "attestation_too_old" if {
	answers
	aged
}

reasons contains "node_not_trusted" if {
	answers
	not ok
	not aged
	not contraindicated
}

reasons contains "node_not_trusted" if {
	not answers
	not loadable
	not contraindicated
}

answers if input.action in {"infer", "export"}

contraindicated if input.node.trust == "contraindicated"

# Trusted enough, but for too long.
aged if {
	input.node.trust in {"affirming", "warning"}
	policy := data.node
	serves(policy, input.node.trust)
	sensitivity := data.edgewarden.sensitivity.name
	not current(policy, sensitivity)
}
