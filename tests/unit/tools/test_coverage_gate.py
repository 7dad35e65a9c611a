"""The gate on coverage: what it adds up, and what it says when a bar is not cleared."""

import json

import pytest

from tools.coverage_gate import OVERALL_PERCENT, ROOM_PERCENT, Figure, by_room, figures, shortfalls

FULL = {room: Figure(100, 100) for room in ROOM_PERCENT}


def test_files_add_up_to_rooms():
    """A room is a folder below the package with all that is in it; statements and branches count alike."""
    summary = {"num_statements": 8, "num_branches": 2, "covered_lines": 7, "covered_branches": 1}
    paths = ("agent/audit/log.py", "agent/audit/deep/x.py", "agent/clock.py")
    report = json.dumps({"files": {path: {"summary": summary} for path in paths}}).encode()
    assert by_room(figures(report)) == {"agent/audit": Figure(20, 16), "agent/clock.py": Figure(10, 8)}


def test_what_clears_every_bar_is_silent():
    """The bars themselves are enough."""
    assert shortfalls(FULL | {"agent/cli": Figure(0, 0)}) == []


@pytest.mark.parametrize("room", list(ROOM_PERCENT))
def test_one_line_that_no_test_reaches_names_its_room(room):
    """Below 100 by less than the figure shows is still named, and never shown as 100."""
    assert shortfalls(FULL | {room: Figure(1_000_000, 999_999)}) == [f"{room}: 99.99 % is below the bar of 100 %"]


def test_a_room_that_was_not_measured_does_not_pass():
    """What a renamed folder or a partial run leaves out is named."""
    rooms = {room: figure for room, figure in FULL.items() if room != "agent/audit"}
    assert shortfalls(rooms) == ["agent/audit: was not measured; its bar is 100 %"]


def test_the_whole_tree_has_a_bar_of_its_own():
    """Full rooms do not make up for the rest."""
    found = shortfalls(FULL | {"agent/cli": Figure(700, 640)})
    assert found == [f"overall: 94.00 % is below the bar of {OVERALL_PERCENT:g} %"]
