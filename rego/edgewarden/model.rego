# METADATA
# title: Model
# description: |
#   1. The model is named, and listed in `data.models.models` where unlisted models are refused.
#   2. It was measured: the bytes that would run were extended into the TPM.
#   3. Its package was signed by a key that the policy accepts for it. The agent verified the signature; here it only
#      matters whose it is.
#   4. Its digest is pinned, where the policy pins one.
#   5. For who asks for an answer: the model is in its time window, and the subject used a second factor, where the
#      policy demands these. The node loads a model whenever it starts.
package edgewarden.model

import data.edgewarden.windows

ok if {
	models := data.models
	named
	input.resource.measured == true
	is_signer(input.resource.signer)
	accepted(models, input.resource.model)
	answerable(models, input.resource.model)
}

named if {
	is_string(input.resource.model)
	input.resource.model != ""
}

is_signer(signer) if {
	is_string(signer)
	count(signer) == 64
}

# An unlisted model is judged by the defaults.
accepted(models, model) if {
	not models.models[model]
	models.unlisted == "allow"
	accepts(models.defaults.signers)
} else if {
	entry := models.models[model]
	accepts(signers(models, entry))
	pinned(entry)
}

accepts(allowed) if {
	allowed == "any-trusted"
} else if {
	input.resource.signer in allowed
}

signers(_, entry) := entry.signers

signers(models, entry) := models.defaults.signers if not entry.signers

pinned(entry) if {
	not entry.digests
} else if {
	input.resource.digest in entry.digests
}

answerable(models, model) if {
	input.action in {"infer", "export"}
	windows.model_open(model)
	authenticated(models, model)
} else if {
	input.action in {"load", "open"}
}

authenticated(models, model) if {
	sensitivity := data.edgewarden.sensitivity.name
	not models.models[model].mfa
	not models.sensitivity[sensitivity].mfa
} else if {
	input.subject.mfa == true
}

# The rest explains a denial. What depends on the model's name is explained once there is one.

entry := data.models.models[input.resource.model]

listed_or_free if {
	data.models.unlisted == "allow"
} else if {
	entry
}

known if {
	named
	listed_or_free
}

measured if input.resource.measured == true

signer_trusted if {
	is_signer(input.resource.signer)
	accepts(signers(data.models, entry))
} else if {
	is_signer(input.resource.signer)
	not entry
	accepts(data.models.defaults.signers)
}

reasons contains "model_unknown" if not known

reasons contains "model_not_measured" if not measured

reasons contains "signer_not_trusted" if not signer_trusted

reasons contains "digest_not_allowed" if {
	pins := entry
	not pinned(pins)
}

reasons contains "outside_time_window" if {
	named
	input.action in {"infer", "export"}
	model := input.resource.model
	not windows.model_open(model)
}

reasons contains "mfa_required" if {
	named
	input.action in {"infer", "export"}
	models := data.models
	model := input.resource.model
	data.edgewarden.sensitivity.name
	not authenticated(models, model)
}
