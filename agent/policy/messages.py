"""What asker and worker exchange: questions, answers, and the stamp in shared memory.

Rules:

1. A question is a frame ``id u64 | input JSON``; an answer ``id u64 | status u8 | evaluation time u32 (µs) | body``, the body being the
   decision's JSON or an error's text. Little-endian.
2. Before each evaluation the worker writes (id, start) into 16 bytes that it shares with the asker, and clears the start
   after it. So the asker knows whose evaluation runs too long, or which one killed the worker, without asking.
3. That memory is sealed against a change of size: a worker that was taken over cannot make its asker fault on it.
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket

import msgspec

from agent.errors import IsolationError
from agent.isolation.channel import MAX_FRAME_BYTES

__all__ = [
    "MAX_ANSWER_BYTES",
    "MAX_QUESTION_BYTES",
    "Answer",
    "Endpoint",
    "Stamp",
    "pack_answer",
    "pack_question",
    "stamp_memory",
    "unpack_answer",
    "unpack_question",
]

_QUESTION = struct.Struct("<Q")
_ANSWER = struct.Struct("<QBI")
_OK, _ERROR = 0, 1
MAX_QUESTION_BYTES = MAX_FRAME_BYTES - _QUESTION.size
MAX_ANSWER_BYTES = MAX_FRAME_BYTES - _ANSWER.size
_MAX_EVAL_US = 0xFFFFFFFF
_STAMP_BYTES = 16
_SIZE_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Answer(msgspec.Struct, frozen=True):
    """A worker's answer to one question; exactly one of ``value`` and ``error`` is set."""

    question: int
    eval_us: int
    value: bytes | None = None
    error: str | None = None


class _EndpointText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int
    policy_sha256: str
    revision: str
    request_reads: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A worker as its asker holds it; whoever holds it owns the socket and the descriptor.

    Attributes:
        number: the worker's, unique in this run of the agent; named to the agent when it must be killed.
        sock: the asker's end.
        stamp_fd: the shared memory.
        policy_sha256: digest of the bundle that it decides by.
        revision: that bundle's revision.
        request_reads: what its decisions depend on (:func:`agent.policy.reads.request_reads`); None: they are not to be remembered.
    """

    number: int
    sock: socket
    stamp_fd: int
    policy_sha256: str
    revision: str
    request_reads: tuple[str, ...] | None = None

    def to_frame(self) -> tuple[bytes, tuple[int, int]]:
        """Return a frame and its descriptors, to hand the endpoint to another process."""
        text = _EndpointText(self.number, self.policy_sha256, self.revision, self.request_reads)
        return msgspec.json.encode(text), (self.sock.fileno(), self.stamp_fd)

    @classmethod
    def from_frame(cls, data: bytes, fds: Sequence[int]) -> "Endpoint":
        """Rebuild an endpoint that came from the agent.

        Raises:
            IsolationError: it is malformed; the descriptors are closed then.
        """
        try:
            text = msgspec.json.decode(data, type=_EndpointText)
            sock_fd, stamp_fd = fds
        except ValueError as error:
            for fd in fds:
                os.close(fd)
            raise IsolationError(f"a policy endpoint is malformed: {error}") from error
        sock = socket(fileno=sock_fd)
        return cls(text.number, sock, stamp_fd, text.policy_sha256, text.revision, text.request_reads)

    def close(self) -> None:
        """Give the endpoint up; its worker ends."""
        self.sock.close()
        os.close(self.stamp_fd)


def pack_question(question: int, input_json: bytes) -> bytes:
    """Encode a question; the input has at most :data:`MAX_QUESTION_BYTES`."""
    return _QUESTION.pack(question) + input_json


def unpack_question(frame: bytes) -> tuple[int, bytes]:
    """Decode a question into its id and input.

    Raises:
        IsolationError: it is cut short.
    """
    if len(frame) < _QUESTION.size:
        raise IsolationError("a policy question is cut short")
    return _QUESTION.unpack_from(frame)[0], frame[_QUESTION.size :]


def pack_answer(answer: Answer) -> bytes:
    """Encode an answer, which may be an error because it is too large."""
    status, body = (_OK, answer.value) if answer.value is not None else (_ERROR, (answer.error or "").encode())
    if len(body) > MAX_ANSWER_BYTES:
        status, body = _ERROR, f"the decision has {len(body)} bytes, over {MAX_ANSWER_BYTES}".encode()
    return _ANSWER.pack(answer.question, status, min(answer.eval_us, _MAX_EVAL_US)) + body


def unpack_answer(frame: bytes) -> Answer:
    """Decode an answer.

    Raises:
        IsolationError: it is malformed.
    """
    if len(frame) < _ANSWER.size:
        raise IsolationError("a policy answer is cut short")
    question, status, eval_us = _ANSWER.unpack_from(frame)
    body = frame[_ANSWER.size :]
    if status == _OK:
        return Answer(question, eval_us, value=body)
    return Answer(question, eval_us, error=body.decode(errors="replace"))


def stamp_memory() -> int:
    """Return a descriptor of new memory for one :class:`Stamp`, sealed against a change of size."""
    fd = os.memfd_create("policy-stamp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _STAMP_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
    return fd


class Stamp:
    """Which evaluation runs, and since when, in memory that two processes share.

    Args:
        fd: from :func:`stamp_memory`; mapped, and the caller's to close.
        write: for the worker's side.

    Raises:
        IsolationError: the memory could change its size.
    """

    def __init__(self, fd: int, *, write: bool) -> None:
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise IsolationError("a policy stamp is not memory that can be sealed") from error
        if seals & _SIZE_SEALS != _SIZE_SEALS or os.fstat(fd).st_size != _STAMP_BYTES:
            raise IsolationError("a policy stamp is not sealed memory of its size")
        self._map = mmap.mmap(fd, _STAMP_BYTES, prot=mmap.PROT_READ | (mmap.PROT_WRITE if write else 0))
        # Native u64 items: each is one aligned store or load.
        self._words = memoryview(self._map).cast("Q")

    def begin(self, question: int, start_ns: int) -> None:
        """Note that an evaluation starts; ``start_ns`` is of CLOCK_MONOTONIC, and never 0."""
        words = self._words
        words[0] = question
        words[1] = start_ns

    def end(self) -> None:
        """Note that it is over."""
        self._words[1] = 0

    def running(self) -> tuple[int, int] | None:
        """Return (question, start in ns) of the evaluation that runs; None between two.

        Starts are unique, so two equal readings with the id between them belong together.
        """
        words = self._words
        start = words[1]
        question = words[0]
        return (question, start) if start and words[1] == start else None

    def close(self) -> None:
        """Unmap the memory."""
        self._words.release()
        self._map.close()
