# METADATA
# title: Time windows
# description: |
#   1. A role or a model without windows is always open; one with windows is open in any of them.
#   2. A window is weekdays and a span of the day in UTC, `from` included and `to` excluded, and may have a first and a
#      last instant.
#   3. A time that is absent or not RFC 3339 in UTC is in no window.
package edgewarden.windows

role_open(role) if open_in(data.windows.roles, role)

model_open(model) if open_in(data.windows.models, model)

open_in(bound, name) if {
	not bound[name]
} else if {
	in_any(bound[name])
}

in_any(names) if {
	some name in names
	window := data.windows.definitions[name]
	weekday in window.days
	window.from <= clock
	clock < window.to
	started(window)
	not ended(window)
}

started(window) if {
	not window.not_before
} else if {
	instant >= time.parse_rfc3339_ns(window.not_before)
}

ended(window) if instant >= time.parse_rfc3339_ns(window.not_after)

well_formed if {
	is_string(input.request.time)
	regex.match(`^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?Z$`, input.request.time)
}

instant := time.parse_rfc3339_ns(input.request.time) if well_formed

weekday := time.weekday(instant)

clock := substring(input.request.time, 11, 5) if well_formed
