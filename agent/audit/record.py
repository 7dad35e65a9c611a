"""What one record of the log says, and its bytes.

Rules:

1. A record is an :class:`agent.records.AuditEvent` and, from the log alone, ``seq``, ``node`` and ``time`` (RFC 3339, of
   ``time_us``), in canonical JSON (RFC 8785). An event that names one of the three itself is refused.
2. An event comes from another process: it is at most :data:`MAX_EVENT_BYTES`, it has exactly the fields of its type, and it
   holds only what has one canonical form (no float, no key outside ASCII, no integer past 2**53 - 1).
"""

from __future__ import annotations

from typing import Any

import msgspec

from agent.clock import now_us, rfc3339
from agent.errors import AuditError
from agent.records import AuditEvent, canonical

__all__ = [
    "DROPPED",
    "FULL",
    "GAP",
    "MAX_EVENT_BYTES",
    "MAX_NODE_CHARACTERS",
    "MAX_RECORD_BYTES",
    "RECOVERED",
    "RESUMED",
    "RecordHead",
    "decode_event",
    "encode_event",
    "encode_record",
    "own_event",
    "read_head",
]

MAX_EVENT_BYTES = 64 * 1024  # as a process sends it: what one message of a channel can hold
MAX_NODE_CHARACTERS = 256
MAX_RECORD_BYTES = MAX_EVENT_BYTES + 8 * 1024  # with sequence, node (escaped to six bytes a character) and time
_MAX_SAFE_INTEGER = 2**53 - 1  # as a time in microseconds: the year 2255

# Kinds of the records that the log writes about itself.
GAP = "log.gap"  # stands for records whose segments were removed: first, last, root of the tree before last + 1
FULL = "log.full"  # the disk is full; nothing follows until RESUMED
RESUMED = "log.resumed"  # records are written again; what the failure was
DROPPED = "log.dropped"  # buffered mode: how many records could not be written
RECOVERED = "log.recovered"  # a start has cut an unfinished write: where, how many bytes, their SHA-256

_decoder = msgspec.json.Decoder(AuditEvent)
_encoder = msgspec.json.Encoder(order="sorted")


class RecordHead(msgspec.Struct, frozen=True):
    """The fields of a record that the log itself reads back."""

    seq: int
    kind: str
    time_us: int
    detail: dict[str, Any] = {}


_head_decoder = msgspec.json.Decoder(RecordHead)


def encode_event(event: AuditEvent) -> bytes:
    """Encode an event as one process sends it to another.

    Raises:
        AuditError: it holds something that has no JSON form.
    """
    try:
        return msgspec.json.encode(event)
    except (ValueError, TypeError, RecursionError) as error:
        raise AuditError(f"audit: an event has no JSON form: {error}") from error


def decode_event(data: bytes) -> AuditEvent:
    """Decode and validate an event that another process reports.

    Raises:
        AuditError: it is too large, not an event, or has no canonical form.
    """
    if len(data) > MAX_EVENT_BYTES:
        raise AuditError(f"audit: an event of {len(data)} bytes is over the limit of {MAX_EVENT_BYTES}")
    try:
        event = _decoder.decode(data)
        if not 0 <= event.time_us <= _MAX_SAFE_INTEGER:
            raise ValueError(f"time_us {event.time_us} is outside the years 1970 to 2255")
        for key, micros in event.latency_us.items():
            if not key.isascii() or not -_MAX_SAFE_INTEGER <= micros <= _MAX_SAFE_INTEGER:
                raise ValueError(f"latency_us {key!r}: {micros} has no canonical form")
        if event.detail:
            canonical(event.detail)
    except (ValueError, RecursionError) as error:
        raise AuditError(f"audit: an event is refused: {error}") from error
    return event


def encode_record(event: AuditEvent, seq: int, node: str) -> bytes:
    """Return the record of a decoded event: canonical JSON, faster than through :func:`agent.records.canonical`."""
    fields = msgspec.to_builtins(event)
    fields["seq"] = seq
    fields["node"] = node
    fields["time"] = rfc3339(event.time_us)
    return _encoder.encode(fields)


def own_event(kind: str, **detail: str | int) -> AuditEvent:
    """Return an event that the log reports about itself, now."""
    return AuditEvent(kind=kind, time_us=now_us(), outcome="ok", principal="audit", detail=dict(detail))


def read_head(record: bytes) -> RecordHead | None:
    """Read the log's own fields back; None when the bytes are no record."""
    try:
        return _head_decoder.decode(record)
    except ValueError:
        return None
