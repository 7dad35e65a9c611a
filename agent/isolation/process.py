"""One child process of the agent, held by its pidfd.

Rules:

1. A number that is used again can neither be killed nor waited for by mistake: the pidfd stands for the process, and the
   process stays a zombie until its handle has reaped it.
2. Its end is an event of the loop, asyncio's or uvloop's; no signal handler and no thread is involved.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ExitStatus", "ProcessHandle"]


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended: by an exit ``code`` or by a ``signal``; neither when something else has reaped it."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {signal.Signals(self.signal).name}"
        return "ended in an unknown way" if self.code is None else f"exit code {self.code}"


class ProcessHandle:
    """A running child; needs a running event loop.

    Args:
        pid: of a child of this process that has not been reaped.
        on_exit: called once, when it has ended and is reaped.
    """

    def __init__(self, pid: int, on_exit: Callable[["ProcessHandle"], None] | None = None) -> None:
        self._pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._loop.add_reader(self.pidfd, self._ended)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._pid

    @property
    def status(self) -> ExitStatus | None:
        """How it ended; None while it lives."""
        return self._exit.result() if self._exit.done() else None

    async def wait(self) -> ExitStatus:
        """Wait for its end; any number of tasks may."""
        return await asyncio.shield(self._exit)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if not self._exit.done():
            # A process that is dead and not yet reaped may answer so; its end is on the way.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def _ended(self) -> None:
        try:
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            status = ExitStatus()
        else:
            if info is None:
                return
            by_exit = info.si_code == os.CLD_EXITED
            status = ExitStatus(code=info.si_status) if by_exit else ExitStatus(signal=info.si_status)
        self._loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        self._exit.set_result(status)
        if self._on_exit is not None:
            self._on_exit(self)
