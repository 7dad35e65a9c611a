"""The log on disk, written by one thread: commit, rotation, retention, full disk, recovery.

Rules:

1. One writer a directory, held by ``flock``.
2. A start reads every header and all of the newest segment. What a power cut left unfinished is cut and a record says so; a
   damaged record that had been durable, or segments that do not fit each other, refuse the start.
3. The tree, the sequence and the end of the file move on together, and only behind what was written; after a failed write all
   three go back to what is durable.
4. Whole oldest segments are removed to stay within the budget, never before a gap record that names them and the root up to
   there is durable. The gap record is not signed: that comes with checkpoints.
5. A full disk: the ballast is released, what was under way is still written, then a record that says the disk is full. Then
   nothing is accepted until there is room for the ballast and a whole segment again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from agent.audit.merkle import Frontier, leaf_hash
from agent.audit.reader import LOCK_NAME, list_segments, read_header, replay
from agent.audit.record import FULL, GAP, RECOVERED, RESUMED, encode_record, own_event
from agent.audit.segment import FRAME_OVERHEAD_BYTES, MAX_SEGMENT_BYTES, Ending, Header, pack_frame
from agent.audit.segment_file import NEXT_NAME, SegmentFile, sync_directory
from agent.errors import AuditError, ConfigError, VerificationError
from agent.records import AuditEvent

__all__ = ["Journal", "Space"]

BALLAST_NAME = "ballast"
RESERVE_BYTES = 4096  # at the end of every segment, for the log's own gap and disk-full records
MIN_SEGMENT_BYTES = 256 * 1024
MIN_BALLAST_BYTES = 512 * 1024
MIN_SEGMENTS = 4  # in the budget: one in use, one being made, two of history
LOCK_ATTEMPTS = 20  # a reader holds the lock for microseconds when it asks whether the log is in use
LOCK_INTERVAL_S = 0.05
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Space:
    """What the log may take of the disk, all in bytes.

    Raises:
        ConfigError: the numbers do not fit each other.
    """

    segment_bytes: int = 16 * 1024 * 1024
    budget_bytes: int = 1024 * 1024 * 1024
    ballast_bytes: int = 1024 * 1024

    def __post_init__(self) -> None:
        if not MIN_SEGMENT_BYTES <= self.segment_bytes <= MAX_SEGMENT_BYTES:
            raise ConfigError(f"audit: segment_bytes must be {MIN_SEGMENT_BYTES} to {MAX_SEGMENT_BYTES}")
        if self.ballast_bytes < MIN_BALLAST_BYTES:
            raise ConfigError(f"audit: ballast_bytes must be at least {MIN_BALLAST_BYTES}")
        least = MIN_SEGMENTS * self.segment_bytes + self.ballast_bytes
        if self.budget_bytes < least:
            raise ConfigError(f"audit: budget_bytes must be at least {least}: {MIN_SEGMENTS} segments and the ballast")


@dataclass(frozen=True, slots=True)
class _Finished:
    """A segment that is not written any more, with the tree's root where it begins."""

    first: int
    size: int
    root: str
    path: Path


class Journal:
    """The log's directory, open for writing. Use :meth:`open`; not thread-safe.

    Attributes:
        durable: the tree of all records that are durable; replaced, never changed, so that any thread may read it.
        failure: why nothing can be written now; None when it can.
        lost: records that had been handed to the kernel and were lost to a failed sync, since the start.
    """

    def __init__(
        self, *, directory: Path, node: str, space: Space, strict: bool, lock: int, active: SegmentFile, tree: Frontier
    ) -> None:
        self._directory = directory
        self._node = node
        self._space = space
        self._lock = lock
        self._active = active
        self._strict = strict
        self._finished: list[_Finished] = []
        self._tree = tree
        self._durable_end = active.end
        self.durable = tree
        self.failure: str | None = None
        self.lost = 0
        self._drop_staged()

    # --- start and end ---

    @classmethod
    def open(cls, directory: Path, node: str, space: Space, *, strict: bool) -> Journal:
        """Open or create a log and recover it.

        Args:
            directory: made with mode 0700 when it is missing.
            node: the node's name, for every record.
            space: sizes.
            strict: make every commit durable before it returns; else only :meth:`sync` does.

        Raises:
            AuditError: another process writes it, it can't be read or written, or it is damaged.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _take_lock(directory)
        except OSError as error:
            raise AuditError(f"audit: can't use the log directory {directory}: {error.strerror}") from error
        try:
            return cls._recover(directory, node, space, lock, strict=strict)
        except OSError as error:
            os.close(lock)
            raise AuditError(f"audit: can't open the log in {directory}: {error.strerror}") from error
        except VerificationError as error:
            os.close(lock)
            hint = "run 'edgewarden log verify', keep the directory as evidence and move it away to start a new log"
            raise AuditError(f"audit: the log in {directory} is damaged: {error}; {hint}") from error

    @classmethod
    def _recover(cls, directory: Path, node: str, space: Space, lock: int, *, strict: bool) -> Journal:
        (directory / NEXT_NAME).unlink(missing_ok=True)
        paths = list_segments(directory)
        if not paths:
            active = SegmentFile.prepare(directory, Header(Frontier(), 0), space.segment_bytes)
            active.publish()
            journal = cls(
                directory=directory, node=node, space=space, strict=strict, lock=lock, active=active, tree=Frontier()
            )
            journal._start(())
            return journal
        # 1. Every header is whole and names the segment that stands before it.
        finished = []
        previous: int | None = None
        for path in paths:
            header = read_header(path)
            if previous is not None and header.previous != previous:
                raise VerificationError("segment-link", f"{path.name} follows {header.previous}, not {previous}")
            previous = header.first
            finished.append(_Finished(header.first, path.stat().st_size, header.frontier.root().hex(), path))
        # 2. The newest segment is read whole; what was durable must still be there.
        newest = finished.pop().path
        header, data = read_header(newest), newest.read_bytes()
        replayed = replay(newest.name, header, data)
        if replayed.finding is not None:
            raise VerificationError(replayed.finding.check, f"{replayed.finding.place}: {replayed.finding.text}")
        # 3. What is torn goes, and a record says what it was.
        active = SegmentFile.reopen(directory, header, replayed.end, space.segment_bytes)
        journal = cls(
            directory=directory, node=node, space=space, strict=strict, lock=lock, active=active, tree=replayed.tree
        )
        journal._finished = finished
        recovered = []
        if replayed.ending is Ending.TORN:
            torn = data[replayed.end :].rstrip(b"\0")
            detail: dict[str, str | int] = {"bytes": len(torn), "sha256": sha256(torn).hexdigest()}
            recovered.append(own_event(RECOVERED, segment=newest.name, offset=replayed.end, **detail))
        journal._start(recovered)
        return journal

    def _start(self, recovered: Sequence[AuditEvent]) -> None:
        """Allocate what is needed; a disk that is full already is a failure like any later one, not a refused start."""
        try:
            self._take_ballast()
            if self._active.dirty:
                self._active.repair()
            self._append(recovered, [])
            self.sync()
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Make everything durable, give back the space that is not used, and let the next writer in."""
        try:
            if self.failure is None:
                self.sync()
                self._active.finish()
        except OSError as error:
            self._fail(error)
        finally:
            self._active.close()
            os.close(self._lock)

    # --- writing ---

    def commit(self, events: Sequence[AuditEvent]) -> list[int]:
        """Append events in their order; return the sequence numbers of those that were written.

        When they are fewer than the events, ``failure`` says why. In strict mode what was written is durable.
        """
        sequences: list[int] = []
        if self.failure is not None:
            return sequences
        try:
            self._append(events, sequences)
        except OSError as error:
            self._fail(error)
            if error.errno in _NO_SPACE:
                self._last_words(events[len(sequences) :], sequences)
        return sequences

    @property
    def unsynced(self) -> bool:
        """True when something is written that is not known to be durable."""
        return self._tree is not self.durable

    def sync(self) -> None:
        """Make everything written durable. Raises OSError; :meth:`sync_or_fail` is for callers outside."""
        if self.unsynced:
            self._active.sync()
            self.durable, self._durable_end = self._tree, self._active.end

    def sync_or_fail(self) -> None:
        """Make everything written durable, or go back to what is and set ``failure``."""
        try:
            self.sync()
        except OSError as error:
            self._fail(error)

    def resume(self) -> bool:
        """Try to write again after a failure; True when it works. A record tells how long it lasted."""
        try:
            if self._free_bytes() < self._space.segment_bytes + self._space.ballast_bytes:
                return False
            self._take_ballast()
            self._append([own_event(RESUMED, failure=self.failure or "")], [])
            self.sync()
        except OSError as error:
            self._fail(error)
            return False
        self.failure = None
        return True

    def _append(self, events: Sequence[AuditEvent], sequences: list[int]) -> None:
        """Stage and flush; ``sequences`` grows with what is written, also when this raises."""
        for event in events:
            if not self._stage(event, RESERVE_BYTES):
                self._flush(sequences)
                self._rotate(self._space.segment_bytes)
                self._stage(event, RESERVE_BYTES)
        self._flush(sequences)

    def _stage(self, event: AuditEvent, reserve: int) -> bool:
        """Add a record to the next write; False when the segment has no room for it and the reserve."""
        record = encode_record(event, self._staged_tree.size, self._node)
        room = self._active.capacity - self._active.end - self._staged_bytes - reserve
        if len(record) + FRAME_OVERHEAD_BYTES > room:
            return False
        self._staged_sequences.append(self._staged_tree.size)
        self._staged.append(pack_frame(record, self.durable.size))
        self._staged_bytes += len(self._staged[-1])
        self._staged_tree.append(leaf_hash(record))
        return True

    def _drop_staged(self) -> None:
        self._staged: list[bytes] = []
        self._staged_bytes = 0
        self._staged_sequences: list[int] = []
        self._staged_tree = self._tree.copy()

    def _flush(self, sequences: list[int]) -> None:
        if not self._staged:
            return
        if self._active.dirty:
            self._active.repair()
        self._active.write(b"".join(self._staged))
        self._tree = self._staged_tree
        if self._strict:
            self.sync()
        sequences += self._staged_sequences
        self._drop_staged()

    # --- segments ---

    def _rotate(self, capacity: int) -> None:
        self._retain(capacity)
        self.sync()
        header = Header(self._tree.copy(), self._active.header.first)
        following = SegmentFile.prepare(self._directory, header, capacity)
        try:
            self._active.finish()
            following.publish()
        except OSError:
            following.close()
            raise
        root = self._active.header.frontier.root().hex()
        path = self._directory / self._active.name
        self._finished.append(_Finished(self._active.header.first, self._active.end, root, path))
        self._active.close()
        self._active, self._durable_end = following, following.end

    def _retain(self, wanted: int) -> None:
        """Remove oldest segments until ``wanted`` more bytes fit the budget; first of all, say so in the log."""
        room = self._space.budget_bytes - self._space.ballast_bytes - wanted - self._active.capacity
        taken = sum(segment.size for segment in self._finished)
        leaving = 0
        while taken > room and leaving < len(self._finished):
            taken -= self._finished[leaving].size
            leaving += 1
        if not leaving:
            return
        gone, kept = self._finished[:leaving], self._finished[leaving:]
        active = self._active.header
        first_kept, root = (kept[0].first, kept[0].root) if kept else (active.first, active.frontier.root().hex())
        if not self._stage(own_event(GAP, first=gone[0].first, last=first_kept - 1, root=root), 0):
            return  # no room to say it, so nothing is removed; the next segment will have it
        self._flush([])
        self.sync()
        for segment in gone:
            segment.path.unlink()
        self._finished = kept
        sync_directory(self._directory)

    # --- failure ---

    def _fail(self, error: OSError) -> None:
        """Go back to what is durable, and remember why."""
        if not self._strict:
            self.lost += self._tree.size - self.durable.size
        self._tree = self.durable
        self._active.rewind(self._durable_end)
        self._drop_staged()
        self.failure = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"

    def _last_words(self, events: Sequence[AuditEvent], sequences: list[int]) -> None:
        """With the space of the ballast, write what was under way; then say that the disk is full."""
        failure = self.failure
        try:
            if self._release_ballast():
                self._rotate(self._space.ballast_bytes // 2)
                for event in events:
                    if not self._stage(event, RESERVE_BYTES):
                        break
                self._flush(sequences)
        except OSError as error:
            self._fail(error)
        try:
            if self._stage(own_event(FULL, failure=failure or ""), 0):
                self._flush([])
            self.sync()
        except OSError as error:
            self._fail(error)
        self.failure = failure

    def _release_ballast(self) -> bool:
        path = self._directory / BALLAST_NAME
        if not path.exists():
            return False
        path.unlink()
        sync_directory(self._directory)
        return True

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._directory)
        return disk.f_bavail * disk.f_frsize

    def _take_ballast(self) -> None:
        path = self._directory / BALLAST_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._space.ballast_bytes)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)


def _take_lock(directory: Path) -> int:
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_INTERVAL_S)
        else:
            return fd
    os.close(fd)
    raise AuditError(f"audit: another process writes the log in {directory}")
