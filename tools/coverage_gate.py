"""The bars that the last measured test run must clear, and a table by room; the exit code says whether it did.

The only place where the bars stand. Reads what ``make test COVERAGE=1`` left in ``.coverage``; lines and branches count alike.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

OVERALL_PERCENT = 95.0
ROOM_PERCENT = {"agent/attest": 100.0, "agent/audit": 100.0, "agent/policy": 100.0}


@dataclass(frozen=True, slots=True)
class Figure:
    """What can be reached, statements and branches, and how much of it the tests reached."""

    reachable: int
    reached: int

    @property
    def percent(self) -> float:
        """In 0 to 100; where there is nothing to reach, 100."""
        return 100.0 * self.reached / self.reachable if self.reachable else 100.0

    def __add__(self, other: "Figure") -> "Figure":
        return Figure(self.reachable + other.reachable, self.reached + other.reached)

    def __str__(self) -> str:
        # Cut, never rounded: what is short of a bar must not read as the bar.
        return f"{int(self.percent * 100) / 100:.2f} %"


def by_room(files: Mapping[str, Figure]) -> dict[str, Figure]:
    """Add files up by room: the folder below the package, or the module that stands in none."""
    rooms: dict[str, Figure] = defaultdict(lambda: Figure(0, 0))
    for path, figure in files.items():
        rooms["/".join(PurePosixPath(path).parts[:2])] += figure
    return dict(sorted(rooms.items()))


def shortfalls(rooms: Mapping[str, Figure]) -> list[str]:
    """Return one line for each bar that is not cleared; a room that was not measured at all clears none."""
    found = []
    overall = _sum(rooms.values())
    if overall.percent < OVERALL_PERCENT:
        found.append(f"overall: {overall} is below the bar of {OVERALL_PERCENT:g} %")
    for room, bar in ROOM_PERCENT.items():
        figure = rooms.get(room)
        if figure is None:
            found.append(f"{room}: was not measured; its bar is {bar:g} %")
        elif figure.percent < bar:
            found.append(f"{room}: {figure} is below the bar of {bar:g} %")
    return found


def figures(report: bytes) -> dict[str, Figure]:
    """Read the figures of each file from coverage's JSON report."""
    return {
        path: Figure(
            summary["num_statements"] + summary["num_branches"],
            summary["covered_lines"] + summary["covered_branches"],
        )
        for path, summary in ((path, file["summary"]) for path, file in json.loads(report)["files"].items())
    }


def main() -> int:
    """Print the table and what is short of its bar."""
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", "-"]
    report = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if report.returncode != 0:
        print("coverage: nothing was measured; make coverage does it", file=sys.stderr)
        return 1
    rooms = by_room(figures(report.stdout))
    for room, figure in rooms.items():
        bar = f"{ROOM_PERCENT[room]:g} %" if room in ROOM_PERCENT else ""
        print(f"{room:24}{figure!s:>10}  {bar}".rstrip())
    print(f"{'overall':24}{_sum(rooms.values())!s:>10}  {OVERALL_PERCENT:g} %")
    short = shortfalls(rooms)
    for line in short:
        print(f"coverage: {line}", file=sys.stderr)
    return 1 if short else 0


def _sum(figures: Iterable[Figure]) -> Figure:
    return sum(figures, Figure(0, 0))


if __name__ == "__main__":
    sys.exit(main())
