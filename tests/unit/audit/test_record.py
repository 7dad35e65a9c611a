"""Records: what an event may hold and what its bytes are."""

import json

import msgspec
import orjson
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from agent.audit.record import (
    MAX_EVENT_BYTES,
    MAX_NODE_CHARACTERS,
    MAX_RECORD_BYTES,
    decode_event,
    encode_event,
    encode_record,
    own_event,
    read_head,
)
from agent.clock import rfc3339
from agent.errors import AuditError
from agent.records import AuditEvent, canonical
from tests.support.audit import event

_keys = st.text(st.characters(max_codepoint=127), max_size=8)
_integers = st.integers(-(2**53) + 1, 2**53 - 1)
_values = st.recursive(
    st.none() | st.booleans() | _integers | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)
_events = st.builds(
    AuditEvent,
    kind=st.text(max_size=9),
    time_us=st.integers(0, 2**53 - 1),
    outcome=st.sampled_from(["ok", "denied", "refused", "failed"]),
    principal=st.text(max_size=20),
    reasons=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    latency_us=st.dictionaries(_keys, _integers, max_size=4),
    detail=st.dictionaries(_keys, _values, max_size=4),
)


@given(_events, st.integers(0, 2**53 - 1), st.text(max_size=9))
def test_the_fast_encoding_is_the_canonical_one(sent, seq, node):
    """A record's bytes are RFC 8785 of the event's fields with sequence, node and time, as two other encoders write them."""
    received = decode_event(encode_event(sent))
    assert received == sent
    fields = msgspec.to_builtins(sent, str_keys=True) | {"seq": seq, "node": node, "time": rfc3339(sent.time_us)}
    record = encode_record(received, seq, node)
    plain = orjson.loads(orjson.dumps(fields))
    assert record == canonical(plain) == rfc8785.dumps(plain)
    head = read_head(record)
    assert head is not None
    assert (head.seq, head.kind, head.time_us) == (seq, sent.kind, sent.time_us)


@pytest.mark.parametrize(
    "fields",
    [
        {"detail": {"a": 1.5}},
        {"detail": {"a": [{"b": 2**53}]}},
        {"detail": {"ä": 1}},
        {"latency_us": {"ä": 1}},
        {"latency_us": {"a": 2**53}},
        {"latency_us": {"a": "1"}},
        {"time_us": -1},
        {"time_us": 2**53},
        {"time_us": 2**70},
        {"outcome": "maybe"},
        {"seq": 7},
        {"node": "other"},
        {"time": "1970-01-01T00:00:00Z"},
        {"kind": None},
    ],
)
def test_an_event_without_a_canonical_form_is_refused(fields):
    """Floats, large integers, keys outside ASCII, foreign fields and the log's own fields never get into a record."""
    with pytest.raises(AuditError):
        decode_event(json.dumps({"kind": "k", "time_us": 1, "outcome": "ok"} | fields).encode())


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_bytes_leak_another_error(data):
    """Whatever another process sends is an event or an AuditError."""
    try:
        decode_event(data)
    except AuditError:
        return
    raise AssertionError(data)


def test_deep_nesting_is_refused():
    """JSON nested past what a decoder can follow is an AuditError, on the way in and on the way out."""
    deep = b'{"kind":"k","time_us":1,"outcome":"ok","detail":{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}}"
    with pytest.raises(AuditError, match="refused"):
        decode_event(deep)
    loop: dict[str, object] = {}
    loop["loop"] = loop
    for detail in (loop, {"a": object()}, {"a": "\ud800"}):
        with pytest.raises(AuditError, match="no JSON form"):
            encode_event(AuditEvent(kind="k", time_us=1, outcome="ok", detail=detail))


def test_an_event_at_the_limit_fits_a_record():
    """The largest event, from the node with the longest name, makes a record within the record's limit; one byte more is refused."""
    room = MAX_EVENT_BYTES - len(encode_event(event(pad=0)))
    largest = encode_event(event(pad=room))
    assert len(largest) == MAX_EVENT_BYTES
    assert len(encode_record(decode_event(largest), 2**53 - 1, "\x01" * MAX_NODE_CHARACTERS)) <= MAX_RECORD_BYTES
    with pytest.raises(AuditError, match="over the limit"):
        decode_event(encode_event(event(pad=room + 1)))


def test_the_logs_own_events_are_events():
    """What the log reports about itself passes the same validation."""
    own = own_event("log.gap", first=0, last=9, root="00")
    assert decode_event(encode_event(own)) == own
    assert own.detail == {"first": 0, "last": 9, "root": "00"}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"seq":1,"kind":"k"}', b'{"seq":"1","kind":"k","time_us":1}', b"\xff"]
)
def test_what_is_no_record_has_no_head(data):
    """Bytes that are not a record are told from one."""
    assert read_head(data) is None
