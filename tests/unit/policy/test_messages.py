"""Messages between asker and worker: nothing that either sends harms the other."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import IsolationError
from agent.isolation.channel import channel_pair
from agent.isolation.memfd import seal_bytes
from agent.policy.messages import (
    MAX_ANSWER_BYTES,
    Answer,
    Endpoint,
    Stamp,
    pack_answer,
    pack_question,
    stamp_memory,
    unpack_answer,
    unpack_question,
)

U64 = st.integers(0, 2**64 - 1)


@given(U64, st.binary(max_size=100))
def test_questions_come_through(number, body) -> None:
    """What is packed is unpacked."""
    assert unpack_question(pack_question(number, body)) == (number, body)


@given(U64, st.integers(0, 2**32 - 1), st.binary(max_size=100), st.text(max_size=100))
def test_answers_come_through(number, eval_us, value, error) -> None:
    """Values and errors are told apart."""
    for answer in (Answer(number, eval_us, value=value), Answer(number, eval_us, error=error)):
        assert unpack_answer(pack_answer(answer)) == answer


def test_what_does_not_fit_is_an_error_answer() -> None:
    """A decision over the limit becomes an error, and a time over 32 bits is capped."""
    answer = unpack_answer(pack_answer(Answer(1, 2**40, value=bytes(MAX_ANSWER_BYTES + 1))))
    assert answer.value is None
    assert "over" in (answer.error or "")
    assert answer.eval_us == 2**32 - 1


@given(st.binary(max_size=40))
def test_any_frame_gives_a_message_or_our_error(frame) -> None:
    """No bytes leak another error."""
    for unpack in (unpack_question, unpack_answer):
        try:
            unpack(frame)
        except IsolationError:
            assert len(frame) < 13


def test_a_stamp_is_seen_by_the_other_side() -> None:
    """What one mapping writes, the other reads; after the end nothing runs."""
    fd = stamp_memory()
    writer, reader = Stamp(fd, write=True), Stamp(fd, write=False)
    os.close(fd)
    assert reader.running() is None
    writer.begin(2**63, 7)
    assert reader.running() == (2**63, 7)
    writer.end()
    assert reader.running() is None
    with pytest.raises(TypeError):
        reader.begin(1, 2)
    writer.close()
    reader.close()


def test_a_stamp_that_could_shrink_is_refused() -> None:
    """Memory that its other owner could cut off under the reader is not mapped."""
    plain = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(plain, 16)
    small = seal_bytes("x", b"12345678").fd
    reader, writer = os.pipe()
    for fd in (plain, small, reader):
        with pytest.raises(IsolationError, match="stamp"):
            Stamp(fd, write=False)
    for fd in (plain, small, reader, writer):
        os.close(fd)


def test_an_endpoint_travels() -> None:
    """An endpoint that is handed to another process names the same worker and policy."""
    ours, theirs = channel_pair()
    sent = Endpoint(7, ours, stamp_memory(), "ab", "r1")
    data, fds = sent.to_frame()
    got = Endpoint.from_frame(data, [os.dup(fd) for fd in fds])
    assert (got.number, got.policy_sha256, got.revision) == (7, "ab", "r1")
    got.sock.send(b"x")
    assert theirs.recv(1) == b"x"
    for end in (sent, got, theirs):
        end.close()


@pytest.mark.parametrize("data", [b"", b"{}", b'{"number":1,"policy_sha256":"","revision":"","more":1}', b"\xff"])
def test_a_malformed_endpoint_closes_its_descriptors(data) -> None:
    """Descriptors that came with nonsense do not leak."""
    fds = os.pipe()
    with pytest.raises(IsolationError, match="malformed"):
        Endpoint.from_frame(data, fds)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_an_endpoint_needs_two_descriptors() -> None:
    """A frame with another number of descriptors is malformed."""
    fds = [os.dup(0)]
    with pytest.raises(IsolationError, match="malformed"):
        Endpoint.from_frame(b'{"number":1,"policy_sha256":"","revision":""}', fds)
