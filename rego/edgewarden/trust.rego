# METADATA
# title: Trust
# description: |
#   1. A node serves models up to the sensitivity that `data.node.serves` gives its last Attestation Result.
#   2. An affirming or warning result counts for as long as the model's sensitivity allows.
#   3. `unknown` counts only while the node is not enrolled. `contraindicated` and `none` never count.
#   4. Loading answers nobody: a node that is not contraindicated may load, so that it is ready when its result comes.
package edgewarden.trust

ok if {
	input.node.trust in {"affirming", "warning"}
	serves
	fresh
}

ok if {
	input.node.trust == "unknown"
	data.node.enrolled == false
	serves
}

loadable if input.node.trust in {"affirming", "warning", "none", "unknown"}

serves if data.edgewarden.sensitivity.rank <= data.models.sensitivity[data.node.serves[input.node.trust]].rank

fresh if {
	0 <= input.node.attested_age_s
	input.node.attested_age_s <= data.node.max_attested_age_s[data.edgewarden.sensitivity.name]
}

reasons contains "node_contraindicated" if input.node.trust == "contraindicated"

reasons contains "node_not_trusted" if {
	input.action in {"infer", "export"}
	input.node.trust != "contraindicated"
	not ok
	not stale
}

reasons contains "node_not_trusted" if {
	input.action in {"load", "open"}
	input.node.trust != "contraindicated"
	not loadable
}

reasons contains "node_not_trusted" if not stated

reasons contains "attestation_too_old" if {
	input.action in {"infer", "export"}
	stale
}

stated if input.node.trust != null

# Trusted enough, but for too long.
stale if {
	input.node.trust in {"affirming", "warning"}
	serves
	not fresh
}
