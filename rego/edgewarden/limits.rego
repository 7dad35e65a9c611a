# METADATA
# title: Limits
# description: |
#   1. The limit is the subject's own, else the model's, else the most generous of the roles that grant the request,
#      else the default.
#   2. Size, batch, lifetime budget and anomaly score must be within it. A number that is absent is not within.
#      A range check is a type check as well: in Rego's order null and booleans come before numbers, all else after.
#   3. What changes with every request (rates, concurrency) is counted by the enforcing side, which gets the limit's name as an
#      obligation. No rule here reads `input.request.rate`: a decision that depends on it can never be remembered.
package edgewarden.limits

name := value if {
	value := data.limits.subjects[input.subject.kind][input.subject.id]
} else := value if {
	value := data.models.models[input.resource.model].limit
} else := value if {
	value := most_generous(data.limits)
} else := data.limits["default"]

most_generous(policy) := fastest[1] if {
	some _ in policy.roles
	candidates := {[policy.limits[candidate].requests_per_second, candidate] |
		some role, candidate in policy.roles
		role in data.edgewarden.rbac.granting
	}
	count(candidates) > 0
	fastest := max(candidates)
}

limit := data.limits.limits[name]

ok if {
	bound := limit
	0 <= input.request.bytes
	input.request.bytes <= bound.max_bytes
	1 <= input.request.batch
	input.request.batch <= bound.max_batch
	history_fits(bound)
}

# Most limits bound no more than size.
history_fits(bound) if {
	not bound.lifetime_budget
	not bound.max_anomaly
} else if {
	budget_left(bound)
	usual(bound)
}

budget_left(bound) if {
	not bound.lifetime_budget
} else if {
	1 <= input.request.budget_left
	input.request.budget_left <= bound.lifetime_budget
}

usual(bound) if {
	not bound.max_anomaly
} else if {
	0 <= input.request.anomaly
	input.request.anomaly <= bound.max_anomaly
}

# The rest explains a denial.

size_fits(bound) if {
	0 <= input.request.bytes
	input.request.bytes <= bound.max_bytes
}

batch_fits(bound) if {
	1 <= input.request.batch
	input.request.batch <= bound.max_batch
}

reasons contains "limit_undefined" if not limit

reasons contains "request_too_large" if {
	bound := limit
	not size_fits(bound)
}

reasons contains "batch_too_large" if {
	bound := limit
	not batch_fits(bound)
}

reasons contains "budget_exhausted" if {
	bound := limit
	not budget_left(bound)
}

reasons contains "input_anomalous" if {
	bound := limit
	not usual(bound)
}
