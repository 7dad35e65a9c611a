"""What agent and gateway say to each other: round trips, and bytes that are no message."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import messages
from agent.errors import IsolationError
from agent.records import AuditEvent

TEXT = st.text(max_size=20)
COUNT = st.integers(0, 2**63 - 1)
AGENT = st.one_of(
    st.builds(messages.WorkerEndpoint, COUNT, TEXT, TEXT),
    st.builds(messages.PolicyData, TEXT),
    st.builds(messages.LoadModel, COUNT, TEXT, TEXT, TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple), st.booleans()),
    st.builds(messages.UnloadModel, TEXT, TEXT),
    st.builds(messages.NodeFacts, TEXT, st.none() | COUNT, st.dictionaries(TEXT, st.booleans(), max_size=3)),
    st.just(messages.Serve()),
    st.builds(messages.Drain, COUNT),
)
GATEWAY = st.one_of(
    st.just(messages.Ready()),
    st.builds(messages.ModelReport, COUNT, TEXT),
    st.builds(messages.Overrun, COUNT),
    st.builds(
        messages.Statistics,
        st.dictionaries(st.sampled_from(["refusals_total|reason=rate", "requests_total|model=a.b|outcome=ok"]), COUNT),
        st.integers(0, 1000),
        st.integers(0, 1000),
    ),
    st.builds(messages.Fatal, TEXT),
    st.just(messages.Drained()),
)


@given(AGENT)
def test_what_the_agent_says_arrives(message):
    """Every message of the agent is decoded to itself."""
    assert messages.decode_agent_message(messages.encode(message)) == message


@given(GATEWAY)
def test_what_a_gateway_says_arrives(message):
    """Every message of a gateway is decoded to itself."""
    assert messages.decode_gateway_message(messages.encode(message)) == message


@given(st.one_of(AGENT, GATEWAY))
def test_neither_side_takes_the_others_word(message):
    """A gateway can't say what only the agent says, nor the other way round."""
    decode = (
        messages.decode_gateway_message if isinstance(message, messages.AgentMessage) else messages.decode_agent_message
    )
    with pytest.raises(IsolationError):
        decode(messages.encode(message))


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(lambda m, n, b: m[:n] + b, GATEWAY.map(messages.encode), st.integers(0, 60), st.binary(max_size=4)),
        st.integers(500, 20_000).map(lambda depth: b'{"type":"statistics","counters":' + b"[" * depth),
        st.just(b'{"type":"fatal","error":"\xff"}'),
        st.just(b'{"type":"fatal","error":"\\ud800"}'),
    )
)
def test_bytes_are_a_message_or_an_isolation_error(frame):
    """Whatever a process sends, decoding ends in a message or in the error that ends that process."""
    for decode in (messages.decode_gateway_message, messages.decode_agent_message):
        try:
            decode(frame)
        except IsolationError:
            continue


@pytest.mark.parametrize(
    "key",
    [
        "requests_total",
        "requests_total|model",
        "refusals_total|reason=rate|x=y",
        "latency|le=1|stage=a\nb",
        'refusals_total|reason="} 1',
        "latency|le=1",
        "other_total|reason=rate",
        "requests_total|model=" + "m" * 200 + "|outcome=ok",
        "",
    ],
)
def test_a_counter_that_no_gateway_has_is_no_message(key):
    """The names and labels of counters are fixed: a gateway can't break the exposition or fill it."""
    frame = msgspec.json.encode({"type": "statistics", "counters": {key: 1}, "open_connections": 0, "in_work": 0})
    with pytest.raises(IsolationError):
        messages.decode_gateway_message(frame)


def test_counters_are_bounded():
    """More counters than there can be, or a negative one, is no message."""
    for counters in (
        {f"refusals_total|reason={n:x}".replace("0", "a"): 1 for n in range(5000)},
        {"unrecorded_refusals_total": -1},
    ):
        frame = msgspec.json.encode({"type": "statistics", "counters": counters, "open_connections": 0, "in_work": 0})
        with pytest.raises(IsolationError):
            messages.decode_gateway_message(frame)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=50), st.sampled_from([messages.APPEND, messages.ACKNOWLEDGE]))
def test_hot_frames_are_told_apart(number, rest, kind):
    """A hot frame gives its number and the rest; one of another kind, or one that is cut short, is none."""
    frame = kind + number.to_bytes(8, "little") + rest
    assert messages.split_hot_frame(frame, kind) == (number, rest)
    other = messages.ACKNOWLEDGE if kind == messages.APPEND else messages.APPEND
    assert messages.split_hot_frame(frame, other) is None
    assert messages.split_hot_frame(frame[:8], kind) is None


def test_an_event_travels_in_its_frame():
    """The event in an append frame is the event; an acknowledgement carries its error's words."""
    event = AuditEvent(kind="infer", time_us=1, outcome="ok", principal="é")
    hot = messages.split_hot_frame(messages.append_frame(7, event), messages.APPEND)
    assert hot is not None
    assert (hot[0], msgspec.json.decode(hot[1], type=AuditEvent)) == (7, event)
    assert messages.split_hot_frame(messages.acknowledge_frame(7, "é"), messages.ACKNOWLEDGE) == (7, "é".encode())
