# METADATA
# title: Sensitivity
# description: |
#   1. A model's sensitivity is what the policy says of it, else what its signed manifest says, else the default.
#   2. A word that `data.models.sensitivity` does not rank has no rank, so that every comparison with it denies.
package edgewarden.sensitivity

name := value if {
	value := data.models.models[input.resource.model].sensitivity
} else := value if {
	value := input.resource.sensitivity
} else := data.models.defaults.sensitivity
