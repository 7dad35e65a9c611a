"""Framed messages with file descriptors between two processes of the node, over ``SOCK_SEQPACKET``.

Rules:

1. A message is at most :data:`MAX_MESSAGE_BYTES`; it holds one or more frames, each a little-endian u32 length and that
   many bytes. Larger content travels as a sealed memfd.
2. Frames that are queued in the same turn of the event loop go out in one message: the wake-up of the other process is
   what costs, not the bytes.
3. Descriptors belong to a frame that stands alone in its message. A receiver that does not expect descriptors closes
   them.
4. The peer may be hostile: a malformed message closes the channel (:class:`agent.errors.IsolationError`), and a peer
   that does not read is cut off once :data:`MAX_QUEUED_FRAMES` or :data:`MAX_QUEUED_BYTES` wait for it.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.errors import IsolationError

__all__ = [
    "MAX_DESCRIPTORS",
    "MAX_FRAME_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_QUEUED_BYTES",
    "MAX_QUEUED_FRAMES",
    "AsyncChannel",
    "Channel",
    "Frame",
    "channel_pair",
]

MAX_MESSAGE_BYTES = 64 * 1024
MAX_FRAME_BYTES = MAX_MESSAGE_BYTES - 4
MAX_DESCRIPTORS = 253  # SCM_MAX_FD of the kernel
MAX_QUEUED_FRAMES = 8192
MAX_QUEUED_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct("<I")
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)


@dataclass(frozen=True, slots=True)
class Frame:
    """One received frame; whoever takes it owns its descriptors."""

    data: bytes
    fds: tuple[int, ...] = ()

    def close_fds(self) -> None:
        """Close descriptors that nobody wants."""
        for fd in self.fds:
            os.close(fd)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, close-on-exec, one for each end."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _pack(frames: Sequence[bytes]) -> bytes:
    return b"".join([part for frame in frames for part in (_LENGTH.pack(len(frame)), frame)])


def _unpack(message: bytes) -> list[bytes]:
    frames = []
    at = 0
    while at < len(message):
        if len(message) - at < _LENGTH.size:
            raise IsolationError("channel: a frame's length is cut short")
        (length,) = _LENGTH.unpack_from(message, at)
        at += _LENGTH.size
        if length > len(message) - at:
            raise IsolationError("channel: a frame is longer than its message")
        frames.append(message[at : at + length])
        at += length
    return frames


def _check_outgoing(frame: bytes, fds: Sequence[int]) -> None:
    if len(frame) > MAX_FRAME_BYTES:
        raise IsolationError(f"channel: a frame of {len(frame)} bytes is over {MAX_FRAME_BYTES}; send a sealed memfd")
    if len(fds) > MAX_DESCRIPTORS:
        raise IsolationError(f"channel: {len(fds)} descriptors are over {MAX_DESCRIPTORS}")


def _receive(sock: socket.socket) -> list[Frame] | None:
    """Read one message; None at the end of the stream."""
    message, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise IsolationError("channel: a message is over the limit")
        if not message:
            return None
        payloads = _unpack(message)
        if fds and len(payloads) != 1:
            raise IsolationError("channel: descriptors came with several frames")
    except IsolationError:
        for fd in fds:
            os.close(fd)
        raise
    return [Frame(payloads[0], tuple(fds))] if fds else [Frame(payload) for payload in payloads]


def _send(sock: socket.socket, message: bytes, fds: Sequence[int]) -> None:
    if fds:
        socket.send_fds(sock, [message], list(fds))
    else:
        sock.send(message)


def _duplicate(fds: Sequence[int]) -> tuple[int, ...]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401 -- what was duplicated before a failure must be closed
    except OSError as error:
        for fd in copies:
            os.close(fd)
        raise IsolationError(f"channel: a descriptor cannot be duplicated ({error.strerror})") from error
    return tuple(copies)


class Channel:
    """The blocking end, for processes whose only work is to answer (workers, inspector, zygote)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Return the socket's descriptor, for ``select`` and for handing it on."""
        return self._sock.fileno()

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Send one frame.

        Raises:
            IsolationError: it is too large, or the peer is gone.
        """
        _check_outgoing(frame, fds)
        self.send_many([frame], fds)

    def send_many(self, frames: Sequence[bytes], fds: Sequence[int] = ()) -> None:
        """Send frames that together fit one message; none at all sends nothing.

        Raises:
            IsolationError: they are too large, or the peer is gone.
        """
        if not frames:  # an empty message would read as the end of the stream
            return
        message = _pack(frames)
        if len(message) > MAX_MESSAGE_BYTES:
            raise IsolationError(f"channel: {len(frames)} frames do not fit one message of {MAX_MESSAGE_BYTES} bytes")
        try:
            _send(self._sock, message, fds)
        except OSError as error:
            raise IsolationError(f"channel: the peer is gone ({error.strerror})") from error

    def receive(self, timeout_s: float | None = None) -> list[Frame] | None:
        """Wait for one message and return its frames; None when the peer has closed.

        Raises:
            IsolationError: the message is malformed, or nothing came within ``timeout_s``.
        """
        self._sock.settimeout(timeout_s)
        try:
            return _receive(self._sock)
        except (TimeoutError, BlockingIOError) as error:
            raise IsolationError(f"channel: no answer within {timeout_s} s") from error
        except ConnectionError:
            return None

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


class AsyncChannel:
    """The end inside an event loop: callbacks for what comes, coalescing for what goes.

    Args:
        sock: one end of :func:`channel_pair`; owned from now on.
        on_frame: called for each frame; owns the frame's descriptors.
        on_close: called once, when the peer has closed, has broken the framing or does not read any more.
    """

    def __init__(self, sock: socket.socket, on_frame: Callable[[Frame], None], on_close: Callable[[], None]) -> None:
        self._sock = sock
        self._on_frame = on_frame
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._queued_bytes = 0
        self._flush_scheduled = False
        self._writing = False
        self.closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, frame: bytes, fds: Sequence[int] = ()) -> None:
        """Queue one frame for the end of this turn of the loop; ``fds`` are duplicated at once.

        Raises:
            IsolationError: the frame is too large, the channel is closed, or the peer does not read.
        """
        _check_outgoing(frame, fds)
        if self.closed:
            raise IsolationError("channel: closed")
        if len(self._queue) >= MAX_QUEUED_FRAMES or self._queued_bytes + len(frame) > MAX_QUEUED_BYTES:
            self.close()
            raise IsolationError("channel: the peer does not read")
        self._queue.append((frame, _duplicate(fds) if fds else ()))
        self._queued_bytes += len(frame)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Close this end and tell the owner."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self._on_close()

    def _flush(self) -> None:
        self._flush_scheduled = False
        while self._queue and not self.closed:
            frames, fds, size = self._next_message()
            try:
                _send(self._sock, _pack(frames), fds)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            for _ in range(size):
                self._queued_bytes -= len(self._queue.popleft()[0])
            for fd in fds:
                os.close(fd)
        if self._writing and not self.closed:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())

    def _next_message(self) -> tuple[list[bytes], tuple[int, ...], int]:
        frames: list[bytes] = []
        room = MAX_MESSAGE_BYTES
        for frame, fds in self._queue:
            if fds:
                return ([frame], fds, 1) if not frames else (frames, (), len(frames))
            room -= len(frame) + _LENGTH.size
            if room < 0:
                break
            frames.append(frame)
        return frames, (), len(frames)

    def _readable(self) -> None:
        try:
            frames = _receive(self._sock)
        except BlockingIOError:
            return
        except (OSError, IsolationError):
            frames = None
        if frames is None:
            self.close()
            return
        for frame in frames:
            if self.closed:  # by the owner, over a frame before this one
                frame.close_fds()
            else:
                self._on_frame(frame)
