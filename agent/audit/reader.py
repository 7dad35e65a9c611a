"""Reading a log from outside: verify all of it, or follow its end. Needs no running agent and changes nothing.

Rules:

1. A log is verified in this order, and each finding names the check, the segment, the byte and the sequence number: the file's
   name, the header, its link to the segment before, the sequence and the root where it begins, each frame, each record's
   sequence, what stands behind the last frame; then each gap record against the tree.
2. Nothing that can't be read is passed over: a segment is left at its first bad place, and that is a finding.
3. Segments missing at the start are only in order when a gap record further on names them and the root up to there. (A gap
   record is not signed yet: whoever may write the directory may forge one, or cut the newest records off. Checkpoints
   will close that.)
4. An unfinished write behind the last record is a finding too, unless an agent has the log open right now.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent.audit.merkle import Frontier, leaf_hash
from agent.audit.record import GAP, RecordHead, read_head
from agent.audit.segment import (
    MAX_HEADER_BYTES,
    MAX_SEGMENT_BYTES,
    Ending,
    Frame,
    Header,
    frames,
    how_it_ends,
    segment_name,
)
from agent.errors import AuditError, VerificationError

__all__ = [
    "LOCK_NAME",
    "Finding",
    "LogReport",
    "Replayed",
    "list_segments",
    "read_header",
    "replay",
    "tail",
    "verify_log",
]

LOCK_NAME = "lock"
FOLLOW_INTERVAL_S = 0.2
_ATTEMPTS = 3  # a live log may drop its oldest segment between listing and reading


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a log that is not as it must be.

    Attributes:
        check: name of the check that failed.
        segment: file name.
        offset: byte in the file.
        seq: sequence number of the first record concerned.
        text: what is wrong, in words.
    """

    check: str
    segment: str
    offset: int
    seq: int
    text: str

    @property
    def place(self) -> str:
        """Where, in words."""
        return f"{self.segment} at byte {self.offset}, record {self.seq}"

    def __str__(self) -> str:
        return f"{self.check}: {self.place}: {self.text}"


@dataclass(frozen=True, slots=True)
class LogReport:
    """What a whole log is worth.

    Attributes:
        first: sequence number of the oldest record that is kept.
        size: records in the tree, those before ``first`` included.
        root: hex of the tree's root.
        segments: files read.
        gaps: ranges (first, last) that gap records name.
        in_use: an agent has the log open.
        findings: what is wrong, in the order of the log; empty when the log verifies.
    """

    first: int
    size: int
    root: str
    segments: int
    gaps: tuple[tuple[int, int], ...]
    in_use: bool
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class Replayed:
    """One segment, read from its first frame to its last.

    Attributes:
        tree: the frontier behind its last readable record.
        end: byte at which that record ends.
        ending: what stands there.
        finding: the first place that is wrong. A torn end is none: its reader knows whether it may be.
    """

    tree: Frontier
    end: int
    ending: Ending
    finding: Finding | None
    gaps: tuple[RecordHead, ...]


def list_segments(directory: Path) -> list[Path]:
    """Return the log's segment files, oldest first.

    Raises:
        AuditError: the directory can't be read.
    """
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".seg")
    except OSError as error:
        raise AuditError(f"audit: can't read the log directory {directory}: {error.strerror}") from error


def read_header(path: Path) -> Header:
    """Read a segment's header; its name must be the one that the header demands.

    Raises:
        VerificationError: ``segment-header`` or ``segment-name``.
    """
    with path.open("rb") as file:
        return _header(path, file.read(MAX_HEADER_BYTES))


def _header(path: Path, data: bytes) -> Header:
    header = Header.unpack(data)
    if path.name != segment_name(header.first):
        raise VerificationError("segment-name", f"the file begins with record {header.first}")
    return header


def _read(path: Path, start: int = 0) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(MAX_SEGMENT_BYTES + 1)
    if len(data) > MAX_SEGMENT_BYTES:
        raise VerificationError("segment-header", f"the file is larger than {MAX_SEGMENT_BYTES} bytes")
    return data


def replay(name: str, header: Header, data: bytes) -> Replayed:
    """Read the frames of one segment into the tree."""
    tree, end = header.frontier.copy(), header.size
    gaps: list[RecordHead] = []
    for frame in frames(data, header.size):
        head = read_head(frame.record)
        if head is None or head.seq != tree.size:
            found = "no record" if head is None else f"record {head.seq}"
            finding = Finding("sequence", name, frame.start, tree.size, f"here stands {found}")
            return Replayed(tree, frame.start, Ending.DAMAGED, finding, tuple(gaps))
        if head.kind == GAP:
            gaps.append(head)
        tree.append(leaf_hash(frame.record))
        end = frame.end
    ending = how_it_ends(data, end, tree.size)
    damaged = Finding("record", name, end, tree.size, ending.value) if ending is Ending.DAMAGED else None
    return Replayed(tree, end, ending, damaged, tuple(gaps))


def _in_use(directory: Path) -> bool:
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@dataclass(slots=True)
class _Verification:
    """The state of one pass over a log, segment by segment."""

    in_use: bool
    findings: list[Finding] = field(default_factory=list)
    gaps: list[tuple[str, RecordHead]] = field(default_factory=list)
    roots: dict[int, str] = field(default_factory=dict)  # by the size of the tree at a segment's start
    first: int | None = None
    tree: Frontier = field(default_factory=Frontier)
    previous: int | None = None
    broken: bool = False  # the tree of the segment before ends too early to compare with

    def segment(self, path: Path, *, is_last: bool) -> None:
        """Check one segment; the caller goes through them in order."""
        name = path.name
        # 1. The name and the header.
        try:
            data = _read(path)
            header = _header(path, data)
        except VerificationError as error:
            self._find(error.check, name, 0, error.message)
            self.broken = True
            return
        # 2. The link to the segment before, the sequence and the root where it begins.
        self._join(name, header)
        self.roots[header.first] = header.frontier.root().hex()
        # 3. Every frame and every record's sequence.
        replayed = replay(name, header, data)
        if is_last and self.in_use and replayed.finding is not None:
            replayed = replay(name, header, _read(path))  # the first read may have overtaken a write
        self.tree, self.previous = replayed.tree, header.first
        self.gaps += [(name, gap) for gap in replayed.gaps]
        # 4. What stands behind the last frame.
        self.broken = replayed.finding is not None
        if replayed.finding is not None:
            self.findings.append(replayed.finding)
        elif not is_last and replayed.ending is not Ending.CLEAN:
            self._find(
                "segment-end", name, replayed.end, f"a segment that was finished ends with {replayed.ending.value}"
            )
        elif replayed.ending is Ending.TORN and not self.in_use:
            text = f"{replayed.ending.value}; a power cut leaves this, the agent's next start cuts it and records that"
            self._find("torn-end", name, replayed.end, text)

    def _join(self, name: str, header: Header) -> None:
        if self.first is None:
            self.first = header.first
            return
        if self.broken:
            return
        if header.previous != self.previous or header.first != self.tree.size:
            text = f"follows {header.previous}, but before it stands {self.previous} and the next record is {self.tree.size}"
            self._find("segment-link", name, 0, text)
        elif header.frontier.peaks != self.tree.peaks:
            self._find("root", name, 0, "the records before this segment are not those it was written after")

    def finish(self) -> None:
        """Check the gap records against the tree, once all segments are read."""
        start = self.first or 0
        named = 0
        for name, gap in self.gaps:
            last, root = gap.detail.get("last"), gap.detail.get("root")
            if not isinstance(last, int) or last >= gap.seq:
                self.findings.append(Finding("gap", name, 0, gap.seq, "the gap record names no range before itself"))
                continue
            named = max(named, last + 1)
            if last + 1 >= start and self.roots.get(last + 1) != root:
                text = f"the gap record's root is not the tree's root at {last + 1}"
                self.findings.append(Finding("gap", name, 0, gap.seq, text))
        if start > named:
            text = f"records {named} to {start - 1} are missing and no gap record names them"
            self.findings.insert(0, Finding("missing-start", segment_name(start), 0, named, text))

    def _find(self, check: str, name: str, offset: int, text: str) -> None:
        self.findings.append(Finding(check, name, offset, self.tree.size, text))


def verify_log(directory: Path) -> LogReport:
    """Verify a whole log by reading it once; memory for one segment is needed.

    Raises:
        AuditError: the directory holds no log or can't be read.
    """
    for _ in range(_ATTEMPTS):
        paths = list_segments(directory)
        if not paths:
            raise AuditError(f"audit: {directory} holds no log")
        state = _Verification(_in_use(directory))
        try:
            for path in paths:
                state.segment(path, is_last=path is paths[-1])
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AuditError(f"audit: can't read {error.filename}: {error.strerror}") from error
        state.finish()
        ranges = [(gap.detail.get("first"), gap.detail.get("last")) for _, gap in state.gaps]
        return LogReport(
            first=state.first or 0,
            size=state.tree.size,
            root=state.tree.root().hex(),
            segments=len(paths),
            gaps=tuple((a, b) for a, b in ranges if isinstance(a, int) and isinstance(b, int)),
            in_use=state.in_use,
            findings=tuple(state.findings),
        )
    raise AuditError(f"audit: segments of {directory} keep vanishing while they are read")


def tail(directory: Path, count: int, *, follow: bool = False) -> Iterator[bytes]:
    """Yield the newest ``count`` records, oldest of them first, and with ``follow`` each new one as it is written.

    Raises:
        AuditError: the directory holds no log or can't be read.
        VerificationError: ``record``, at a damaged record; nothing behind it is shown.
    """
    paths = list_segments(directory)
    if not paths:
        raise AuditError(f"audit: {directory} holds no log")
    try:
        shown: deque[bytes] = deque(maxlen=count)
        last = _Follower(paths[-1])
        newest = [frame.record for frame in last.more()]
        for path in reversed(paths[:-1]):
            if len(newest) + len(shown) >= count:
                break
            older = _Follower(path)
            shown.extendleft(reversed([frame.record for frame in older.more()][-(count - len(newest) - len(shown)) :]))
            older.check_finished()
        yield from ([*shown, *newest][-count:] if count else [])
        while follow:
            following = [path for path in list_segments(directory) if path.name > last.path.name]
            if last.grew():
                yield from (frame.record for frame in last.more())
            if following:
                last.check_finished()
                last = _Follower(following[0])
            else:
                time.sleep(FOLLOW_INTERVAL_S)
    except OSError as error:
        raise AuditError(f"audit: can't read {error.filename}: {error.strerror}") from error


class _Follower:
    """A place in a segment that moves on with the records that are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._seq = header.first
        self._end = header.size

    def more(self) -> list[Frame]:
        """Return what was written since the last call; offsets count from where that one ended."""
        new, damaged = self._advance()
        if damaged:  # or the read has overtaken a write, which it can't twice
            again, damaged = self._advance()
            new += again
            if damaged:
                raise self._damaged()
        return new

    def grew(self) -> bool:
        """Say cheaply whether there is more to read."""
        with self.path.open("rb") as file:
            file.seek(self._end)
            return file.read(1) not in {b"", b"\0"}

    def _advance(self) -> tuple[list[Frame], bool]:
        data = _read(self.path, self._end)
        new = list(frames(data, 0))
        end = new[-1].end if new else 0
        self._seq += len(new)
        self._end += end
        return new, how_it_ends(data, end, self._seq) is Ending.DAMAGED

    def check_finished(self) -> None:
        """Check that a segment with a successor ends with its last record."""
        if self.path.stat().st_size != self._end:
            raise self._damaged()

    def _damaged(self) -> VerificationError:
        return VerificationError("record", f"{self.path.name} at byte {self._end}: record {self._seq} can't be read")
