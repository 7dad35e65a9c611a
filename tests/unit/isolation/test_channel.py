"""Framing, descriptors and hostile peers of the channels."""

import asyncio
import os
import socket
import struct
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import IsolationError
from agent.isolation.channel import (
    MAX_DESCRIPTORS,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_FRAMES,
    AsyncChannel,
    Channel,
    Frame,
    _unpack,
    channel_pair,
)


@pytest.fixture
def pair():
    ours, theirs = channel_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def open_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=20))
def test_frames_arrive_as_they_were_sent(frames):
    """What is sent in one message comes out frame by frame, empty frames included."""
    ours, theirs = channel_pair()
    with ours, theirs:
        Channel(ours).send_many(frames)
        assert Channel(theirs).receive(5) == [Frame(frame) for frame in frames]


@given(st.binary(max_size=64))
def test_any_bytes_are_frames_or_an_isolation_error(message):
    """A hostile message never raises anything else, and what it yields is exactly its bytes."""
    try:
        frames = _unpack(message)
    except IsolationError:
        return
    assert b"".join(struct.pack("<I", len(frame)) + frame for frame in frames) == message


def test_the_largest_frame_fits_and_one_byte_more_does_not(pair):
    """The limit is exact on both sides."""
    ours, theirs = map(Channel, pair)
    ours.send(bytes(MAX_FRAME_BYTES))
    assert theirs.receive(5) == [Frame(bytes(MAX_FRAME_BYTES))]
    with pytest.raises(IsolationError, match="over"):
        ours.send(bytes(MAX_FRAME_BYTES + 1))
    with pytest.raises(IsolationError, match="fit"):
        ours.send_many([b"", bytes(MAX_FRAME_BYTES)])
    pair[0].send(bytes(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(IsolationError, match="over the limit"):
        theirs.receive(5)


def test_nothing_to_send_is_not_the_end(pair):
    """An empty list of frames sends nothing; the peer does not take it for a close."""
    ours, theirs = map(Channel, pair)
    ours.send_many([])
    ours.send(b"x")
    assert theirs.receive(5) == [Frame(b"x")]


def test_a_closed_peer_reads_as_the_end_and_cannot_be_sent_to(pair):
    """After the peer closed, receive gives None and send is an error of ours."""
    ours, theirs = map(Channel, pair)
    theirs.close()
    assert ours.receive(5) is None
    with pytest.raises(IsolationError, match="gone"):
        ours.send(b"x")


@pytest.mark.parametrize("timeout_s", [0, 0.001])
def test_silence_is_an_error_after_the_timeout(pair, timeout_s):
    """A peer that says nothing ends the wait with an error of ours, for a timeout of 0 as well."""
    with pytest.raises(IsolationError, match="no answer"):
        Channel(pair[0]).receive(timeout_s)


def test_descriptors_arrive_as_copies_that_do_not_survive_exec(pair):
    """A received descriptor is the receiver's own and close-on-exec."""
    ours, theirs = map(Channel, pair)
    reader, writer = os.pipe()
    ours.send(b"pipe", [writer])
    os.close(writer)
    frames = theirs.receive(5)
    assert frames is not None
    (frame,) = frames
    (copy,) = frame.fds
    assert not os.get_inheritable(copy)
    os.write(copy, b"x")
    frame.close_fds()
    assert os.read(reader, 2) == b"x"
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("message", [b"\1\0\0\0a\1\0\0\0b", b"\1", b"\2\0\0\0a", b"\xff\xff\xff\xff"])
def test_descriptors_of_a_malformed_message_are_closed(pair, message):
    """A hostile peer cannot fill the descriptor table with messages that are refused."""
    before = open_count()
    socket.send_fds(pair[0], [message], [0] * 10)
    with pytest.raises(IsolationError):
        Channel(pair[1]).receive(5)
    assert open_count() == before


def test_too_many_descriptors_are_refused_before_they_are_sent(pair):
    """The kernel's limit on descriptors is checked by the sender."""
    with pytest.raises(IsolationError, match="descriptors"):
        Channel(pair[0]).send(b"x", [0] * (MAX_DESCRIPTORS + 1))


class Owner:
    """An AsyncChannel with what it delivered."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.channel = AsyncChannel(sock, self.frames.put_nowait, self.ended.set)


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request):
    return request.param


def test_frames_of_one_turn_travel_in_one_message(run, pair):
    """Frames that are queued in the same turn of the loop reach the peer as one message."""

    async def main() -> None:
        owner = Owner(pair[0])
        for number in range(10):
            owner.channel.send(str(number).encode())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        frames = Channel(pair[1]).receive(5)
        assert frames == [Frame(str(number).encode()) for number in range(10)]
        owner.channel.close()

    run(main())


def test_order_and_descriptors_are_kept_when_the_peer_is_slow(run, pair):
    """More than the socket holds, with descriptors between, arrives complete and in order."""

    async def main() -> None:
        before = open_count()
        sender, receiver = Owner(pair[0]), Owner(pair[1])
        count = 300
        for number in range(count):
            sender.channel.send(number.to_bytes(2, "big") + bytes(8000), [0] if number % 7 == 0 else [])
        for number in range(count):
            frame = await receiver.frames.get()
            assert int.from_bytes(frame.data[:2], "big") == number
            assert len(frame.fds) == (number % 7 == 0)
            frame.close_fds()
        sender.channel.close()
        await receiver.ended.wait()
        assert receiver.channel.closed
        assert open_count() == before - 2

    run(main())


@pytest.mark.parametrize(("size", "limit"), [(1, MAX_QUEUED_FRAMES), (60_000, MAX_QUEUED_BYTES // 60_000)])
def test_a_peer_that_does_not_read_is_cut_off(run, pair, size, limit):
    """The queue is bounded in frames and in bytes; past the bound the channel closes and its descriptors with it."""

    async def main() -> None:
        owner = Owner(pair[0])
        before = open_count()
        fds = [0] if size > 1 else []
        for _ in range(limit):
            owner.channel.send(bytes(size), fds)
        with pytest.raises(IsolationError, match="does not read"):
            owner.channel.send(bytes(size), fds)
        assert owner.ended.is_set()
        assert open_count() == before - 1
        with pytest.raises(IsolationError, match="closed"):
            owner.channel.send(b"x")

    run(main())


@pytest.mark.parametrize("message", [b"\1", b"\2\0\0\0a", b"\0\0\0\0\1"])
def test_a_malformed_message_closes_the_async_end_once(run, pair, message):
    """Broken framing ends the channel, tells the owner once, and delivers nothing."""

    async def main() -> None:
        owner = Owner(pair[0])
        pair[1].send(message)
        await owner.ended.wait()
        assert owner.frames.empty()
        owner.ended.clear()
        owner.channel.close()
        assert not owner.ended.is_set()

    run(main())


def test_a_frame_after_the_owner_closed_is_not_delivered(run, pair):
    """An owner that closes over one frame gets none of those that came in the same message."""

    async def main() -> None:
        seen = []
        ended = asyncio.Event()

        def take(frame: Frame) -> None:
            seen.append(frame.data)
            channel.close()

        channel = AsyncChannel(pair[0], take, ended.set)
        Channel(pair[1]).send_many([b"1", b"2", b"3"])
        await ended.wait()
        await asyncio.sleep(0)
        assert seen == [b"1"]

    run(main())


def test_a_descriptor_that_is_not_open_leaks_none(pair):
    """When one of several descriptors cannot be duplicated, the copies of the others are closed."""

    async def main() -> None:
        owner = Owner(pair[0])
        before = open_count()
        with pytest.raises(IsolationError, match="duplicated"):
            owner.channel.send(b"x", [0, 0, 2**20])
        assert open_count() == before
        owner.channel.close()

    asyncio.run(main())
