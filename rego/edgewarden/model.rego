# METADATA
# title: Model
# description: |
#   1. The model is named, and listed in `data.models.models` where unlisted models are refused.
#   2. It was measured: the bytes that would run were extended into the TPM.
#   3. Its package was signed by a key that the policy accepts for it.
#   4. Its digest is pinned, where the policy pins one.
#   5. It is in its time window, and the subject used a second factor, where the policy demands these of an answer.
package edgewarden.model

import data.edgewarden.windows

ok if {
	known
	measured
	signer_trusted
	digest_accepted
	answerable
}

known if {
	is_string(input.resource.model)
	input.resource.model != ""
	listed_or_free(data.models)
}

listed_or_free(models) if {
	models.unlisted == "allow"
} else if {
	models.models[input.resource.model]
}

measured if input.resource.measured == true

# The agent verified the signature; here it only matters whose it is.
signer_trusted if {
	is_string(input.resource.signer)
	count(input.resource.signer) == 64
	accepts(signers(data.models))
}

signers(models) := value if {
	value := models.models[input.resource.model].signers
} else := models.defaults.signers

accepts(allowed) if {
	allowed == "any-trusted"
} else if {
	input.resource.signer in allowed
}

digest_accepted if accepts_digest(data.models.models)

accepts_digest(models) if {
	not models[input.resource.model].digests
} else if {
	input.resource.digest in models[input.resource.model].digests
}

# The node loads a model whenever it starts; windows and second factors are for those who ask for answers.
answerable if {
	input.action in {"infer", "export"}
	open_now
	authenticated
} else if {
	input.action in {"load", "open"}
}

open_now if windows.model_open(input.resource.model)

authenticated if {
	not demands_factor(data.models)
} else if {
	input.subject.mfa == true
}

demands_factor(models) if {
	models.models[input.resource.model].mfa
} else if {
	models.sensitivity[data.edgewarden.sensitivity.name].mfa
}

reasons contains "model_unknown" if not known

reasons contains "model_not_measured" if not measured

reasons contains "signer_not_trusted" if not signer_trusted

# What depends on the model's name is explained once there is one. (An absent member inside a negated expression is
# read differently by the engines.)
reasons contains "digest_not_allowed" if {
	known
	not digest_accepted
}

reasons contains "outside_time_window" if {
	known
	input.action in {"infer", "export"}
	not open_now
}

reasons contains "mfa_required" if {
	known
	input.action in {"infer", "export"}
	not authenticated
}
