"""What a child process is given, and how one is forked so that the agent is its parent.

Rules:

1. A child is forked twice, so that the agent, a child subreaper, becomes its parent: the process that forked it is no
   single point of failure, and the agent alone learns how it ends.
2. It runs nothing before the agent is its parent and before it is bound to die with it (``PR_SET_PDEATHSIG``).
3. It never returns into the code that forked it: any exception ends it with exit code 70 and one line on stderr which names
   type and place, and nothing of what it was working on.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

from agent.errors import IsolationError
from agent.isolation.kernel import prctl
from agent.isolation.sandbox import Limits, Profile, SandboxReport, enter

__all__ = [
    "EXIT_SOFTWARE",
    "Child",
    "close_all_but",
    "describe",
    "die_with",
    "fork_child",
    "fork_worker",
    "run_to_exit",
]

EXIT_SOFTWARE = 70  # EX_SOFTWARE of sysexits.h
_PR_SET_PDEATHSIG = 1
_PID = struct.Struct("<i")
_STDIO = (0, 1, 2)
_MAX_DESCRIPTOR = 1 << 30
_INHERITED = Limits(headroom_bytes=0, open_files=0)


@dataclass(frozen=True, slots=True)
class Child:
    """What an entry function ``def main(child: Child) -> None`` works with.

    The entry first loads what needs a path (``/proc/self/fd/N`` of a descriptor works), then calls ``enter_sandbox`` once,
    and only then touches bytes that it must not trust.

    Attributes:
        channel: connected to the agent; wrap it into a ``Channel`` or an ``AsyncChannel``.
        args: what the agent passed, JSON.
        fds: descriptors by the name that the agent gave them; the child owns them.
        enter_sandbox: confines this process and tells the agent.
    """

    channel: socket.socket
    args: dict[str, Any]
    fds: dict[str, int]
    enter_sandbox: Callable[[], SandboxReport]


def fork_child(
    parent: int, run: Callable[[], None], *, keep: Collection[int], announce: Callable[[int], None] = lambda _: None
) -> int:
    """Fork a process whose parent is ``parent``, an ancestor that is a child subreaper.

    Args:
        parent: its pid.
        run: what the new process does; it ends when this returns. It starts with the agent as its parent.
        keep: descriptors that it keeps besides standard input, output and error; all others are closed.
        announce: given its pid before it starts to run.

    Returns:
        The new process's pid; it is not the caller's to wait for.

    Raises:
        IsolationError: the kernel does not give another process.
    """
    start_read, start_write = os.pipe()
    pid_read, pid_write = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            run_to_exit(lambda: _between(parent, run, {*keep, start_read}, start_read, pid_write))
        os.close(pid_write)
        pid_write = -1
        # Its end is what gives the new process its new parent, so this comes before the start.
        os.waitpid(between, 0)
        told = os.read(pid_read, _PID.size)
        if len(told) != _PID.size:
            raise IsolationError("cannot fork: the process in between died")
        pid = int(_PID.unpack(told)[0])
        announce(pid)
    except OSError as error:
        raise IsolationError(f"cannot fork: {error.strerror}") from error
    finally:
        for fd in (start_read, start_write, pid_read, pid_write):
            if fd >= 0:
                os.close(fd)
    return pid


def fork_worker(run: Callable[[], None], *, keep: Collection[int], connect_port: int | None = None) -> int:
    """Fork a policy worker from inside a policy template; the template's parent, the agent, becomes its parent too.

    Args:
        run: the worker's loop; it starts in a worker's own, tighter sandbox.
        keep: descriptors that the worker keeps.
        connect_port: as the template's.

    Returns:
        The worker's pid, for the agent's ``Zygote.adopt``.

    Raises:
        IsolationError: the kernel does not give another process.
    """

    def confined() -> None:
        # What the template has is inherited; what it could not have, the agent has accepted.
        enter(Profile.POLICY_WORKER, _INHERITED, required=False, connect_port=connect_port)
        run()

    return fork_child(os.getppid(), confined, keep=keep)


def _between(parent: int, run: Callable[[], None], keep: Collection[int], start_read: int, pid_write: int) -> None:
    pid = os.fork()
    if pid == 0:
        close_all_but(keep)
        os.read(start_read, 1)  # ends when the forking process has reaped the one in between, or died
        os.close(start_read)
        die_with(parent)
        run()
    else:
        os.write(pid_write, _PID.pack(pid))


def die_with(parent: int) -> None:
    """Be killed when ``parent`` dies; end at once when that has already happened.

    A change of user clears this: call it again after one.
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(EXIT_SOFTWARE)


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor but standard input, output, error and ``keep``."""
    after = 0
    for fd in sorted({*_STDIO, *keep}):
        if after < fd:  # closerange(0, 0) would close everything
            os.closerange(after, fd)
        after = fd + 1
    os.closerange(after, _MAX_DESCRIPTOR)


def run_to_exit(run: Callable[[], None]) -> NoReturn:
    """Run, then end this process, whatever happens: 0 when ``run`` returns, its code for ``SystemExit``, else 70."""
    code = EXIT_SOFTWARE
    try:
        run()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_SOFTWARE * (stop.code is not None)
    finally:
        if (error := sys.exc_info()[1]) is not None:
            os.write(2, f"{describe(error)}\n".encode())
        os._exit(code)


def describe(error: BaseException) -> str:
    """Name an error's type and place, without its text, which may hold a payload."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "an unknown place"
    return f"edgewarden child {os.getpid()}: {type(error).__name__} at {where}"
