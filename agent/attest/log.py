"""The node's own measurement log: a file and a PCR that tell the same story.

Rules:

1. Append, fsync, extend, in that order, before what is measured takes effect. A failure at any point fails the
   measurement; the next operation first recovers as :meth:`MeasurementLog.open` does.
2. Recovery replays the file against PCR_Read. The last entry may be pending (written, not extended): it is extended.
   A last entry that is cut short was never extended: it is cut off. Any other difference is tampering: a
   VerificationError, and nothing is measured until the TPM is reset.
3. No recovery while a job that ran out of time may still extend the PCR: else an entry could be extended twice.
4. One file per resetCount. A greater count starts a new file and keeps the old ones; a count that falls means that the
   TPM was cleared. A count that rises under a running agent fails every measurement until the log is opened again.
5. The start value is given by the operator's approval, zero or another; an empty log must find the PCR at it.
6. A second log may stand beside this one, in another PCR (:meth:`MeasurementLog.mirror_to`). An entry goes there first, and is measured when it is
   in both: so the other claims what this one does, or more, never less. Each is checked and recovered by itself.
7. One lock orders appends and quotes, so that a quote and the entries that are sent with it belong together.

The file and the TPM are touched on the TPM's thread only, so their order is that thread's order, whatever is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from array import array
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

from agent.attest.log_state import LogState
from agent.attest.measurement import (
    ALLOWED_PCRS,
    MAX_ENTRY_BYTES,
    MAX_LOG_BYTES,
    MAX_LOG_ENTRIES,
    ZERO_PCR,
    Entry,
    boot_aggregate,
    read_entry,
    replay,
)
from agent.attest.tpm import Tpm, TpmClearedError
from agent.attest.tpm_thread import TpmThread
from agent.errors import ConfigError, HostError, TpmError, VerificationError

__all__ = ["KEPT_BOOTS", "MeasurementLog", "Snapshot", "TpmResetError", "check_pcr", "fell_from", "retire_logs"]

KEPT_BOOTS = 64  # logs of earlier boots
_BOOT_PCRS = range(10)
_NAME = "boot-{:010d}.ima"


class TpmResetError(TpmError):
    """The TPM was reset while the agent ran: open the log again and measure everything again."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the log holds at one moment.

    Attributes:
        reset_count: the TPM's; names the file.
        count: entries.
        size: bytes of them.
        value: SHA-256 PCR that they replay to.
        state: what they say is in force.
    """

    reset_count: int
    count: int
    size: int
    value: bytes
    state: LogState


def check_pcr(pcr: int, allowed: Collection[int] = ALLOWED_PCRS) -> int:
    """Return the PCR if it can hold the log.

    Raises:
        ConfigError: it can't.
    """
    if pcr not in allowed:
        raise ConfigError(f"attestation: PCR {pcr} can't hold the measurement log; choose one of {sorted(allowed)}")
    return pcr


def _count_of(path: Path) -> int:
    digits = path.stem.removeprefix("boot-")
    if not digits.isdecimal():
        raise VerificationError("measurement-log", f"{path} is not a file of the measurement log")
    return int(digits)


def fell_from(folder: Path, reset_count: int) -> int | None:
    """Return the highest resetCount that a log was kept of, where the TPM's is lower now: it was cleared, or is another.

    Raises:
        VerificationError: ``measurement-log``: a file that is none of its.
    """
    highest = max(map(_count_of, folder.glob("boot-*.ima")), default=0)
    return highest if highest > reset_count else None


def retire_logs(folder: Path, epoch_us: int) -> None:
    """Put the logs of a TPM that was cleared aside; a part of leaving. The one that shows it goes last: an interrupted call can be made again."""
    retired = folder / f"retired-{epoch_us}"
    retired.mkdir(mode=0o700)
    for path in sorted(folder.glob("boot-*.ima"), key=_count_of):
        path.rename(retired / path.name)
    _sync_folder(retired)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class MeasurementLog:
    """The log of this boot. Make it with :meth:`open`."""

    def __init__(
        self, tpm: TpmThread, folder: Path, pcr: int, start: bytes, allowed: Collection[int] = ALLOWED_PCRS
    ) -> None:
        self._tpm = tpm
        self._file = _LogFile(folder, check_pcr(pcr, allowed), start)
        self._mirror: MeasurementLog | None = None
        self._lock = asyncio.Lock()
        self._now: Snapshot | None = None
        self._ends: array[int] = array("Q")  # where in the file each entry ends
        self._reset_count: int | None = None

    @classmethod
    async def open(
        cls,
        tpm: TpmThread,
        folder: Path,
        pcr: int,
        start: bytes = ZERO_PCR,
        allowed: Collection[int] = ALLOWED_PCRS,
    ) -> MeasurementLog:
        """Open, or begin, the log of this boot and recover it; a new one is given its ``boot_aggregate``.

        Args:
            tpm: the TPM's thread.
            folder: where the files of all boots lie.
            pcr: holds the log.
            start: what the PCR held before the first entry.
            allowed: PCRs that may hold this log.

        Raises:
            ConfigError: the PCR is none of those.
            VerificationError: ``measurement-log``: file and PCR tell different stories.
            TpmClearedError: the resetCount fell.
            TpmError, HostError: the TPM or the disk does not do its part.
        """
        log = cls(tpm, folder, pcr, start, allowed)
        await log._begin()
        return log

    async def _begin(self) -> None:
        async with self.locked() as now:
            self._reset_count = now.reset_count
            if now.count == 0:
                boot_pcrs = await self._tpm.call(lambda tpm: tpm.read_pcrs(_BOOT_PCRS))
                await self._append(now, boot_aggregate(boot_pcrs.values()), at_start=True)

    def mirror_to(self, mirror: MeasurementLog) -> None:
        """Give another log every entry from now on, as rule 6 says."""
        self._mirror = mirror

    @property
    def pcr(self) -> int:
        """The PCR that holds the log."""
        return self._file.pcr

    @property
    def settled(self) -> Snapshot | None:
        """The log as it was last known, None while it must be recovered; for health."""
        return self._now

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[Snapshot]:
        """Hold the lock with a recovered log: nothing is appended inside but by the holder.

        Raises:
            VerificationError, TpmError, HostError: as :meth:`open`; TpmResetError besides.
        """
        async with self._lock:
            now = self._now or await self._recover()
            if self._reset_count not in {None, now.reset_count}:
                raise TpmResetError("measurement log: the TPM was reset under the running agent; open the log again")
            yield now

    async def _recover(self) -> Snapshot:
        if self._tpm.outstanding:
            raise TpmError("measurement log: a TPM command that ran out of time may still take effect")
        now, self._ends = await self._tpm.call(self._file.recover)
        self._now = now
        return now

    async def check(self) -> None:
        """Compare the log with the TPM. Where they differ nothing is measured any more, as rule 2 says.

        Raises:
            VerificationError: the PCR holds something else.
            TpmError, TpmResetError: the TPM does not answer, or was reset.
        """
        async with self.locked() as now:
            clock, values = await self._tpm.call(lambda tpm: (tpm.clock(), tpm.read_pcrs([self.pcr])))
            if clock.reset_count != now.reset_count:
                raise TpmResetError("measurement log: the TPM was reset under the running agent; open the log again")
            if values[self.pcr] == now.value:
                return
            self._now = None  # recovery will find the same, and refuse
            raise VerificationError(
                "measurement-log", f"PCR {self.pcr} does not hold what the log says: someone else extended it"
            )

    async def append(self, entry: Entry) -> Snapshot:
        """Measure: when this returns, the entry is durable and in the PCR.

        Raises:
            VerificationError, TpmError, HostError: it must not take effect. The entry may yet be found pending and be
                extended: a log may claim more than was in force, never less.
        """
        if self._mirror is not None:
            await self._mirror.append(entry)
        async with self.locked() as now:
            return await self._append(now, entry)

    async def _append(self, now: Snapshot, entry: Entry, *, at_start: bool = False) -> Snapshot:
        if now.count >= MAX_LOG_ENTRIES or now.size + MAX_ENTRY_BYTES > MAX_LOG_BYTES:
            raise HostError("measurement log: full until the next reboot")
        state = now.state.after([entry], at_start=at_start)
        self._now = None  # until all three steps are done, only the file and the PCR know how far it went
        size = await self._tpm.call(lambda tpm: self._file.append(tpm, now, entry))
        value = replay([entry], now.value)
        self._ends.append(now.size + size)
        self._now = Snapshot(now.reset_count, now.count + 1, now.size + size, value, state)
        return self._now

    def read(self, now: Snapshot, start: int) -> bytes:
        """Return the bytes of the entries from an index on.

        Blocking: to be called on the TPM's thread, with the lock held by the caller.
        """
        return self._file.read(now.reset_count, self._ends[start - 1] if start else 0, now.size)


class _LogFile:
    """The blocking half: runs on the TPM's thread and keeps no state of its own."""

    def __init__(self, folder: Path, pcr: int, start: bytes) -> None:
        self._folder = folder
        self.pcr = pcr
        self._start = start

    def _path(self, reset_count: int) -> Path:
        return self._folder / _NAME.format(reset_count)

    def recover(self, tpm: Tpm) -> tuple[Snapshot, array[int]]:
        """Bring file and PCR together, as rule 2 says."""
        reset_count = tpm.clock().reset_count
        path = self._path(reset_count)
        try:
            self._choose_boot(path, reset_count)
            data = path.read_bytes()
            snapshot, ends, before_last, last = self._replay(reset_count, data)
            self._settle(tpm, snapshot, before_last, last)
            if len(data) > snapshot.size:
                os.truncate(path, snapshot.size)
                _sync_file(path)
        except OSError as error:
            raise HostError(f"measurement log: {path}: {error.strerror}") from error
        return snapshot, ends

    def _choose_boot(self, path: Path, reset_count: int) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        highest = fell_from(self._folder, reset_count)
        if highest is not None:
            raise TpmClearedError(
                f"TPM: its resetCount fell from {highest} to {reset_count}: it was cleared; enrol this node again, after "
                "edgewarden attest leave --offline"
            )
        if path.exists():
            return
        counts = sorted(_count_of(found) for found in self._folder.glob("boot-*.ima"))
        for count in counts[:-KEPT_BOOTS]:
            self._path(count).unlink()
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        _sync_folder(self._folder)

    def _replay(self, reset_count: int, data: bytes) -> tuple[Snapshot, array[int], bytes, Entry | None]:
        """Return the file's snapshot, the ends of its entries, the PCR before the last one, and that one."""
        if len(data) > MAX_LOG_BYTES:
            raise VerificationError("measurement-log", f"{len(data)} bytes are over {MAX_LOG_BYTES}")
        entries: list[Entry] = []
        ends: array[int] = array("Q")
        at = 0
        while (found := read_entry(data, at, self.pcr)) is not None:
            entry, at = found
            entries.append(entry)
            ends.append(at)
        before_last = replay(entries[:-1], self._start)
        value = replay(entries[-1:], before_last)
        state = LogState().after(entries, at_start=True)
        snapshot = Snapshot(reset_count, len(entries), at, value, state)
        return snapshot, ends, before_last, entries[-1] if entries else None

    def _settle(self, tpm: Tpm, snapshot: Snapshot, before_last: bytes, last: Entry | None) -> None:
        (value,) = tpm.read_pcrs([self.pcr]).values()
        if value == snapshot.value:
            return
        if last is None or value != before_last:
            raise VerificationError(
                "measurement-log",
                f"PCR {self.pcr} holds {value.hex()[:16]}…, the log of {snapshot.count} entries replays to "
                f"{snapshot.value.hex()[:16]}…: one of them was changed behind the agent; nothing loads until a reboot",
            )
        tpm.extend(self.pcr, last.template_data())
        (value,) = tpm.read_pcrs([self.pcr]).values()
        if value != snapshot.value:
            raise VerificationError("measurement-log", f"PCR {self.pcr} was extended by another while it was recovered")

    def append(self, tpm: Tpm, now: Snapshot, entry: Entry) -> int:
        """Append, fsync, extend; return the entry's size."""
        if tpm.clock().reset_count != now.reset_count:
            raise TpmResetError("measurement log: the TPM was reset under the running agent; open the log again")
        path = self._path(now.reset_count)
        data = entry.encode(self.pcr)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_size != now.size:
                    raise VerificationError("measurement-log", f"{path} was changed behind the agent")
                if os.write(fd, data) != len(data):
                    raise HostError(f"measurement log: {path}: the disk is full")
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"measurement log: {path}: {error.strerror}") from error
        tpm.extend(self.pcr, entry.template_data())
        return len(data)

    def read(self, reset_count: int, start: int, end: int) -> bytes:
        path = self._path(reset_count)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        except OSError as error:
            raise HostError(f"measurement log: {path}: {error.strerror}") from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
