package edgewarden.windows_test

import data.edgewarden.fixtures
import data.edgewarden.windows

definitions := {
	"shift": {"days": ["Monday", "Tuesday"], "from": "06:00", "to": "18:00"},
	"night": {"days": ["Tuesday"], "from": "22:00", "to": "24:00"},
	"march": {
		"days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
		"from": "00:00",
		"to": "24:00",
		"not_before": "2026-03-01T00:00:00Z",
		"not_after": "2026-04-01T00:00:00Z",
	},
}

at(instant) := fixtures.set(fixtures.infer, "/request/time", instant)

open_at(instant, names) if {
	windows.in_any(names) with input as at(instant) with data.windows.definitions as definitions
}

test_without_windows_it_is_always_open if {
	windows.role_open("operator") with input as fixtures.infer
	windows.model_open("surface-defects") with input as fixtures.infer
	windows.role_open("operator") with input as fixtures.drop(fixtures.infer, "/request/time")
}

test_a_window_includes_its_start_and_excludes_its_end if {
	open_at("2026-03-03T06:00:00Z", ["shift"])
	open_at("2026-03-03T17:59:59.999999Z", ["shift"])
	not open_at("2026-03-03T05:59:59.999999Z", ["shift"])
	not open_at("2026-03-03T18:00:00Z", ["shift"])
	open_at("2026-03-03T23:59:59Z", ["night"])
}

test_a_window_has_weekdays if {
	open_at("2026-03-02T09:00:00Z", ["shift"])
	not open_at("2026-03-04T09:00:00Z", ["shift"])
	not open_at("2026-03-08T09:00:00Z", ["shift"])
}

test_any_window_opens if {
	open_at("2026-03-03T23:00:00Z", ["shift", "night"])
	not open_at("2026-03-03T20:00:00Z", ["shift", "night"])
}

test_a_window_may_begin_and_end_on_a_date if {
	open_at("2026-03-01T00:00:00Z", ["march"])
	open_at("2026-03-31T23:59:59Z", ["march"])
	not open_at("2026-02-28T23:59:59Z", ["march"])
	not open_at("2026-04-01T00:00:00Z", ["march"])
}

test_no_windows_at_all_opens_nothing if {
	not open_at("2026-03-03T09:00:00Z", [])
	not open_at("2026-03-03T09:00:00Z", ["undefined"])
}

test_a_time_that_is_not_rfc3339_in_utc_is_in_no_window if {
	every instant in [
		"", "2026-03-03", "2026-03-03T09:00:00", "2026-03-03T09:00:00+02:00", "2026-03-03 09:00:00Z",
		"2026-03-03T09:00Z", "x2026-03-03T09:00:00Z", "2026-03-03T09:00:00Z\n", null, 1772528400, [],
	] {
		not open_at(instant, ["shift", "march"])
	}
	without := fixtures.drop(fixtures.infer, "/request/time")
	not windows.in_any(["shift"]) with input as without with data.windows.definitions as definitions
}

test_roles_and_models_have_their_own_windows if {
	bound := {"definitions": definitions, "roles": {"operator": ["night"]}, "models": {"surface-defects": ["shift"]}}
	not windows.role_open("operator") with input as fixtures.infer with data.windows as bound
	windows.role_open("analyst") with input as fixtures.infer with data.windows as bound
	windows.model_open("surface-defects") with input as fixtures.infer with data.windows as bound
}
