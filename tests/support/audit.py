"""Building blocks for tests that need an audit log."""

from pathlib import Path

from agent.audit.journal import Journal, Space
from agent.audit.record import RecordHead, read_head
from agent.records import AuditEvent

SMALL = Space(segment_bytes=256 * 1024, budget_bytes=8 * 1024 * 1024, ballast_bytes=512 * 1024)


def event(number: int = 0, *, pad: int = 0) -> AuditEvent:
    """Return an event that looks like an answered inference; ``number`` makes it distinct, ``pad`` large."""
    return AuditEvent(
        kind="infer",
        time_us=1_700_000_000_000_000 + number,
        outcome="ok",
        principal="spiffe://example.org/camera",
        principal_kind="mtls",
        action="infer",
        model="orientation",
        decision_id=f"decision-{number}",
        reasons=("shift ä\u2028",),
        latency_us={"total": 1200, "infer": 900},
        detail={"number": number, "pad": "x" * pad},
    )


def write_log(directory: Path, batches: list[int], *, pad: int = 0, space: Space = SMALL) -> int:
    """Write strict commits of these numbers of records; return how many there are."""
    journal = Journal.open(directory, "node-1", space, strict=True)
    total = 0
    for size in batches:
        written = journal.commit([event(total + n, pad=pad) for n in range(size)])
        assert len(written) == size
        total += size
    journal.close()
    return total


def head_of(record: bytes) -> RecordHead:
    """Read a record that must be one."""
    head = read_head(record)
    assert head is not None
    return head
