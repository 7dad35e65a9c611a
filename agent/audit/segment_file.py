"""The segment that is being written: one file, one writer.

Rules:

1. Space is allocated before it is needed, so that a record's ``fdatasync`` has no size to change, and a full disk shows when a
   segment is made, not in the middle of a record.
2. A segment is made under another name, whole and durable, and renamed: no power cut leaves one without a header.
3. A finished segment is cut to its last record and durable before the next one appears.
4. After a failed write nothing is appended until the file is cut back to its last good record.
"""

from __future__ import annotations

import os
from pathlib import Path

from agent.audit.segment import Header, segment_name

__all__ = ["NEXT_NAME", "SegmentFile", "sync_directory"]

NEXT_NAME = "next.tmp"
_MODE = 0o600


def sync_directory(directory: Path) -> None:
    """Make names that were added, renamed or removed durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class SegmentFile:
    """The end of the log. Every method raises OSError as the kernel gives it.

    Attributes:
        header: what the file begins with.
        end: byte behind the last record written.
        capacity: bytes that are allocated, or shall be after :meth:`repair`.
        dirty: behind ``end`` something may stand that must go first.
    """

    def __init__(self, directory: Path, fd: int, header: Header, end: int, capacity: int) -> None:
        self._directory = directory
        self._fd = fd
        self.header = header
        self.end = end
        self.capacity = capacity
        self.dirty = False
        self._reached = end

    @classmethod
    def prepare(cls, directory: Path, header: Header, capacity: int) -> SegmentFile:
        """Make a new segment, durable but not visible yet; on failure nothing is left."""
        path = directory / NEXT_NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            os.posix_fallocate(fd, 0, capacity)
            os.pwrite(fd, header.pack(), 0)
            os.fsync(fd)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        return cls(directory, fd, header, header.size, capacity)

    @classmethod
    def reopen(cls, directory: Path, header: Header, end: int, capacity: int) -> SegmentFile:
        """Open the newest segment again; it is dirty until :meth:`repair` has cut and allocated it."""
        fd = os.open(directory / segment_name(header.first), os.O_RDWR | os.O_CLOEXEC)
        segment = cls(directory, fd, header, end, max(capacity, end))
        segment.dirty = True
        return segment

    @property
    def name(self) -> str:
        """The file's name, once it is published."""
        return segment_name(self.header.first)

    def publish(self) -> None:
        """Give a prepared segment its name."""
        (self._directory / NEXT_NAME).rename(self._directory / self.name)
        sync_directory(self._directory)

    def write(self, data: bytes) -> None:
        """Append; the data is in the kernel's hands and not durable yet."""
        view = memoryview(data)
        self._reached = self.end + len(data)
        while view:
            written = os.pwrite(self._fd, view, self.end)
            self.end += written
            view = view[written:]

    def sync(self) -> None:
        """Wait until everything written is durable."""
        os.fdatasync(self._fd)

    def rewind(self, end: int) -> None:
        """Go back to an earlier end; dirty when anything may have been written behind it."""
        self.end = end
        self.dirty = self.dirty or self._reached > end

    def repair(self) -> None:
        """Cut what stands behind the last good record and allocate the rest again."""
        os.ftruncate(self._fd, self.end)
        if self.capacity > self.end:
            os.posix_fallocate(self._fd, self.end, self.capacity - self.end)
        os.fsync(self._fd)
        self.dirty = False
        self._reached = self.end

    def finish(self) -> None:
        """Give back the space that is left and make all of it durable; nothing more is appended."""
        os.ftruncate(self._fd, self.end)
        os.fsync(self._fd)
        self.capacity = self.end

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)
