"""The policy processes: a template, which reads a bundle once, and the workers that it forks.

Rules:

1. The template is confined before it looks at the bundle. It refuses it with a reason, or says that it is ready after every
   package was evaluated once.
2. It forks a worker for each command; a worker holds one socket and one stamp, nothing else, and can neither fork nor open
   anything.
3. A worker stamps each evaluation before it starts it; the answers to the questions of one message go back together.
4. Whatever is wrong with a question is the answer's error; whatever is wrong with the worker ends it.
5. Idle, both block in ``recv``; both end when their peer closes.
"""

import functools
import gc
import socket
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from agent.errors import ConfigError, IsolationError, PolicyError, VerificationError
from agent.isolation.channel import MAX_MESSAGE_BYTES, Channel, Frame
from agent.isolation.child import Child, fork_worker
from agent.isolation.memfd import map_sealed
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine
from agent.policy.engine import Engine
from agent.policy.messages import Answer, Stamp, pack_answer, unpack_question
from agent.policy.signature import load_crypto
from agent.policy.template import Forked, Loaded, OpaAccess, Refused, Report, TemplateArgs

__all__ = ["Forked", "Loaded", "Refused", "Report", "TemplateArgs", "serve", "template"]

_FRAME_HEADER_BYTES = 4
_WORKER_FDS = 2

_Make: TypeAlias = Callable[[Bundle], Engine]
_Renew: TypeAlias = Callable[[Engine], Engine]


_BLAME: dict[type[Exception], Literal["policy", "verification", "config", "isolation"]] = {
    PolicyError: "policy",
    VerificationError: "verification",
    ConfigError: "config",
    IsolationError: "isolation",
}


def template(child: Child) -> None:
    """Run as a policy template: descriptor ``bundle`` is a sealed file, the arguments are :class:`TemplateArgs`."""
    args = msgspec.convert(child.args, TemplateArgs)
    if args.trusted_keys:
        load_crypto()
    make, renew = _engines(args.opa)
    child.enter_sandbox()
    channel = Channel(child.channel)
    try:
        engine, loaded = _load(child.fds["bundle"], args, make)
    except (PolicyError, VerificationError, ConfigError, IsolationError) as error:
        _report(channel, Refused(_BLAME[type(error)], str(error)))
        return
    _report(channel, loaded)
    gc.collect()
    gc.freeze()  # workers share these pages as long as nobody writes to them
    while (frames := channel.receive()) is not None:
        for frame in frames:
            _report(channel, _fork(engine, renew, frame, args.opa))


def _engines(opa: OpaAccess | None) -> tuple[_Make, _Renew]:
    """Return what makes the template's engine of a bundle, and what makes a worker's own of that."""
    if opa is None:
        return EmbeddedEngine, lambda engine: engine
    from agent.policy.opa import OpaEngine, check_bundle  # noqa: PLC0415 -- only where OPA decides a process carries its HTTP client

    def make(bundle: Bundle) -> Engine:
        check_bundle(bundle)
        return OpaEngine(opa)

    # Two processes cannot share a connection to OPA.
    return make, lambda _: OpaEngine(opa)


def _load(fd: int, args: TemplateArgs, make: _Make) -> tuple[Engine, Loaded]:
    """Build the engine; what the bundle took besides is free again when this returns."""
    bundle = Bundle.from_bytes(bytes(map_sealed(fd)), [key.encode() for key in args.trusted_keys])
    engine = make(bundle)
    engine.check()
    return engine, Loaded(bundle.revision, bundle.sha256, engine.request_reads)


def _report(channel: Channel, report: Report) -> None:
    channel.send(msgspec.json.encode(report))


def _fork(engine: Engine, renew: _Renew, frame: Frame, opa: OpaAccess | None) -> Report:
    try:
        if len(frame.fds) != _WORKER_FDS:
            raise IsolationError(f"a worker has {_WORKER_FDS} descriptors, not {len(frame.fds)}")
        sock_fd, stamp_fd = frame.fds
        run = functools.partial(_work, engine, renew, sock_fd, stamp_fd)
        return Forked(fork_worker(run, keep=frame.fds, connect_port=None if opa is None else opa.port))
    except IsolationError as error:
        return Refused("isolation", str(error))
    finally:
        frame.close_fds()


def _work(engine: Engine, renew: _Renew, sock_fd: int, stamp_fd: int) -> None:
    own = renew(engine)
    # Its kind is told, for a worker may not ask the kernel.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, sock_fd) as sock:
        serve(own, Channel(sock), Stamp(stamp_fd, write=True))


def serve(engine: Engine, channel: Channel, stamp: Stamp) -> None:
    """Answer questions until the asker closes.

    Raises:
        IsolationError: a message is malformed, or the asker is gone.
    """
    while (frames := channel.receive()) is not None:
        answers: list[bytes] = []
        room = MAX_MESSAGE_BYTES
        for frame in frames:
            frame.close_fds()
            answer = _answer(engine, frame.data, stamp)
            room -= len(answer) + _FRAME_HEADER_BYTES
            if room < 0:
                channel.send_many(answers)
                answers = []
                room = MAX_MESSAGE_BYTES - len(answer) - _FRAME_HEADER_BYTES
            answers.append(answer)
        channel.send_many(answers)


def _answer(engine: Engine, frame: bytes, stamp: Stamp) -> bytes:
    question, input_json = unpack_question(frame)
    start_ns = time.monotonic_ns()
    stamp.begin(question, start_ns)
    value: bytes | None = None
    reason: str | None = None
    try:
        value = engine.evaluate(input_json)
    except PolicyError as error:
        reason = str(error)
    answer = Answer(question, (time.monotonic_ns() - start_ns) // 1000, value, reason)
    packed = pack_answer(answer)
    stamp.end()
    return packed
