"""The fork server: imports once, then gives the agent a fresh child in a few milliseconds.

Rules:

1. It is exec'd by the agent before any secret or TPM is opened, holds nothing but its channel, and runs no input.
2. It dies with the agent; when the agent closes the channel, it ends.
3. It has one thread, or refuses to start: a fork would copy the locks of the others.
4. A child gets its descriptors and no others, the agent as its parent, and its user, before its entry runs.
"""

from __future__ import annotations

import contextlib
import encodings.ascii
import encodings.idna
import encodings.latin_1
import encodings.unicode_escape
import encodings.utf_8_sig  # noqa: F401 -- a codec that is first needed inside the sandbox can't be imported there
import gc
import importlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from agent.errors import IsolationError
from agent.isolation import sandbox
from agent.isolation.channel import Channel, Frame
from agent.isolation.child import Child, close_all_but, describe, die_with, fork_child, run_to_exit
from agent.isolation.kernel import prctl, set_name
from agent.isolation.wire import (
    Confined,
    EntryRequest,
    Failed,
    Forked,
    ProgramRequest,
    Ready,
    Request,
    Status,
    ZygoteOptions,
)

__all__ = ["main"]

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_REQUEST = msgspec.json.Decoder(Request)


def main(options: ZygoteOptions) -> None:
    """Serve spawn requests until the agent closes the channel."""
    # 1. bound to the agent
    die_with(options.agent_pid)
    set_name("ew-zygote")
    close_all_but({options.channel_fd})
    channel = Channel(socket.socket(fileno=options.channel_fd))
    # 2. everything that children need
    for module in options.preload:
        try:
            importlib.import_module(module)
        except ImportError as error:
            channel.send(_encode(Failed(f"cannot import {module}: {error}")))
            return
    # 3. one thread
    if (threads := sandbox.thread_count()) != 1:
        channel.send(_encode(Failed(f"{threads} threads run after the imports; a fork server must have one")))
        return
    prctl(_PR_SET_DUMPABLE, 0)  # no process of this user looks inside, or inside a child before its sandbox
    # 4. what is alive now is never collected, so children share its pages
    gc.collect()
    gc.freeze()
    channel.send(_encode(Ready()))
    while (frames := channel.receive()) is not None:
        for frame in frames:
            _serve(options, frame)


def _serve(options: ZygoteOptions, frame: Frame) -> None:
    status = Channel(socket.socket(fileno=frame.fds[0]))
    try:
        request: Request = _REQUEST.decode(frame.data)
        run: Callable[[], None]
        match request:
            case EntryRequest():
                run = partial(_run_entry, options, request, status, frame.fds)
            case ProgramRequest():
                run = partial(_run_program, options, request, status, frame.fds)
        fork_child(options.agent_pid, run, keep=frame.fds, announce=lambda pid: status.send(_encode(Forked(pid))))
    except (IsolationError, ValueError, RecursionError) as error:
        # The agent may have given this child up and closed the socket.
        with contextlib.suppress(IsolationError):
            status.send(_encode(Failed(str(error))))
    finally:
        status.close()
        for fd in frame.fds[1:]:
            os.close(fd)


def _run_entry(options: ZygoteOptions, request: EntryRequest, status: Channel, fds: Sequence[int]) -> None:
    set_name(f"ew-{request.profile.value}")
    reported = False

    def enter_sandbox() -> sandbox.SandboxReport:
        nonlocal reported
        report = sandbox.enter(
            request.profile,
            request.limits,
            required=options.sandbox_required,
            landlock=request.landlock,
            seccomp=request.seccomp,
            connect_port=request.connect_port,
        )
        status.send(_encode(Confined(report)))
        status.close()
        reported = True
        return report

    try:
        # Found before the change of user, which may not be allowed to read the code.
        module, _, name = request.entry.partition(":")
        entry = getattr(importlib.import_module(module), name)
        _become(options)
        named = dict(zip(request.fds, fds[2:], strict=True))
        entry(Child(socket.socket(fileno=fds[1]), request.args, named, enter_sandbox))
    finally:
        error = sys.exc_info()[1]
        if not reported and error is not None:
            reason = str(error) if isinstance(error, IsolationError) else describe(error)
            status.send(_encode(Failed(reason)))


def _run_program(options: ZygoteOptions, request: ProgramRequest, status: Channel, fds: Sequence[int]) -> None:
    argv = list(request.argv)
    try:
        for name, fd in zip(request.fds, fds[1:], strict=True):
            os.set_inheritable(fd, True)
            argv = [part.replace(f"{{fd:{name}}}", f"/proc/self/fd/{fd}") for part in argv]
        _become(options)
        sandbox.set_limits(request.limits)
        prctl(_PR_SET_NO_NEW_PRIVS, 1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
            signal.signal(number, signal.SIG_DFL)
        os.execve(argv[0], argv, request.env)  # noqa: S606 -- the operator's program, no shell
    except OSError as error:
        status.send(_encode(Failed(f"cannot run {request.argv[0]}: {error.strerror}")))
        raise


def _become(options: ZygoteOptions) -> None:
    """Change to the children's user, which clears PDEATHSIG, and bind to the agent again."""
    if options.user is not None:
        uid, gid = options.user
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        die_with(options.agent_pid)


def _encode(message: Status) -> bytes:
    return msgspec.json.encode(message)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    run_to_exit(lambda: main(msgspec.json.decode(sys.argv[1], type=ZygoteOptions)))
