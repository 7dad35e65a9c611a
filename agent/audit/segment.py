"""The segment file: a header, frames, and what may stand behind the last one.

Rules:

1. The header carries the format's version, the sequence number of its first record, that of the segment before it, and the
   tree's frontier at that point: so a segment that is removed, replaced or moved does not fit its neighbours, and the tree
   goes on when older segments were given up.
2. A frame is a marker, a CRC-32, the length, the number of records that were *durable* when it was written, and the
   record. The CRC covers everything behind it.
3. Behind the last frame a segment in use has only zeros (the space is allocated ahead). Anything else is an unfinished write,
   *torn*, as a power cut leaves it, unless a later frame says that the unreadable record had been durable: then it is *damaged*.
4. Reading is pure: bytes in, values out; no bytes make it raise anything but a VerificationError.

Layout, little-endian: header ``magic[8] | version u16 | peaks u16 | first u64 | previous u64 | peaks * 32 bytes | crc u32``; frame
``marker[4] | crc u32 | length u32 | durable u64 | record``.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from agent.audit.merkle import HASH_BYTES, Frontier
from agent.audit.record import MAX_RECORD_BYTES
from agent.errors import VerificationError

__all__ = [
    "FORMAT_VERSION",
    "FRAME_OVERHEAD_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_SEGMENT_BYTES",
    "Ending",
    "Frame",
    "Header",
    "frames",
    "how_it_ends",
    "pack_frame",
    "segment_name",
]

FORMAT_VERSION = 1
MAX_SEGMENT_BYTES = 256 * 1024 * 1024
_MAGIC = b"EWAUDIT\0"
_HEADER = struct.Struct("<8sHHQQ")
_MARKER = b"\xecWR\x01"  # no UTF-8 text holds it, so no record does
_FRAME = struct.Struct("<4sIIQ")
_CHECKED = struct.Struct("<IQ")
_CRC = struct.Struct("<I")
_CRC_AT = len(_MARKER)
_CHECKED_AT = _CRC_AT + _CRC.size
_MAX_PEAKS = 53
FRAME_OVERHEAD_BYTES = _FRAME.size
MAX_HEADER_BYTES = _HEADER.size + _MAX_PEAKS * HASH_BYTES + _CRC.size


def segment_name(first: int) -> str:
    """Return the file name of the segment that begins with this sequence number; names sort as the numbers do."""
    return f"{first:020d}.seg"


@dataclass(frozen=True, slots=True)
class Header:
    """The start of a segment.

    Attributes:
        frontier: the tree before the segment; its size is the sequence number of the segment's first record.
        previous: first sequence number of the segment before; its own for the first segment of a log.
    """

    frontier: Frontier
    previous: int

    @property
    def first(self) -> int:
        """Sequence number of the segment's first record."""
        return self.frontier.size

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return _HEADER.size + len(self.frontier.peaks) * HASH_BYTES + _CRC.size

    def pack(self) -> bytes:
        """Return the header's bytes."""
        peaks = self.frontier.peaks
        body = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(peaks), self.first, self.previous) + b"".join(peaks)
        return body + _CRC.pack(crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read a header.

        Raises:
            VerificationError: ``segment-header``.
        """
        check = "segment-header"
        # 1. Long enough for what it says of itself, and ours.
        if len(data) < _HEADER.size:
            raise VerificationError(check, "the file is too short for a header")
        magic, version, count, first, previous = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise VerificationError(check, "this is no audit segment")
        end = _HEADER.size + count * HASH_BYTES
        if count > _MAX_PEAKS or len(data) < end + _CRC.size:
            raise VerificationError(check, f"{count} subtree hashes do not fit the file")
        # 2. Undamaged.
        if _CRC.unpack_from(data, end)[0] != crc32(data[:end]):
            raise VerificationError(check, "the checksum does not match")
        # 3. Of a version that is known here.
        if version != FORMAT_VERSION:
            raise VerificationError(check, f"version {version} is not {FORMAT_VERSION}")
        # 4. A tree of that size has those subtrees.
        if previous > first:
            raise VerificationError(check, f"the segment before {first} can't begin with {previous}")
        peaks = (data[at : at + HASH_BYTES] for at in range(_HEADER.size, end, HASH_BYTES))
        try:
            return cls(Frontier(first, peaks), previous)
        except VerificationError as error:
            raise VerificationError(check, error.message) from error


@dataclass(frozen=True, slots=True)
class Frame:
    """One record as it stands in a segment, at bytes ``start`` to ``end``."""

    start: int
    end: int
    durable: int
    record: bytes


class Ending(enum.Enum):
    """What stands behind the last readable frame."""

    CLEAN = "nothing: the file ends with the record"
    OPEN = "zeros: space allocated for records to come"
    TORN = "an unfinished write"
    DAMAGED = "a damaged record that had been durable"


def pack_frame(record: bytes, durable: int) -> bytes:
    """Frame a record, with the number of records that are durable before it is written."""
    body = _CHECKED.pack(len(record), durable) + record
    return _MARKER + _CRC.pack(crc32(body)) + body


def _frame_at(data: bytes, at: int) -> Frame | None:
    """Read the frame at an offset; None when there is no whole, undamaged one."""
    if len(data) - at < _FRAME.size:
        return None
    marker, crc, length, durable = _FRAME.unpack_from(data, at)
    end = at + _FRAME.size + length
    if marker != _MARKER or not 0 < length <= MAX_RECORD_BYTES or end > len(data):
        return None
    if crc32(data[at + _CHECKED_AT : end]) != crc:
        return None
    return Frame(at, end, durable, data[at + _FRAME.size : end])


def frames(data: bytes, start: int) -> Iterator[Frame]:
    """Yield the frames from an offset on, up to the first place where there is no readable one."""
    while frame := _frame_at(data, start):
        yield frame
        start = frame.end


def how_it_ends(data: bytes, end: int, seq: int) -> Ending:
    """Say what stands behind the last readable frame.

    Args:
        data: the whole segment.
        end: where the last readable frame ends.
        seq: sequence number of the record that would come next.
    """
    if end >= len(data):
        return Ending.CLEAN
    if data.count(0, end) == len(data) - end:
        return Ending.OPEN
    at = data.find(_MARKER, end)
    while at >= 0:
        later = _frame_at(data, at)
        if later is not None and later.durable > seq:
            return Ending.DAMAGED
        at = data.find(_MARKER, later.end if later is not None else at + 1)
    return Ending.TORN
