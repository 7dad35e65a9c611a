"""The agent's side of its children: start the zygote, spawn, watch, kill, restart.

Rules:

1. The zygote is exec'd from the main thread, before any secret is opened: PDEATHSIG counts from the thread that starts it.
   After that the agent never forks; whatever runs besides it, OPA included, is spawned by the zygote.
2. A process is known by its pidfd: a number that is used again can neither be killed nor waited for by mistake.
3. A spawn ends when the child has entered its sandbox, or failed to. There is no child that the agent believes confined and
   is not.
4. A pid that a child names (:meth:`Zygote.adopt`) is believed only for a child of this process that nobody holds yet.
5. Restarts back off; a crash loop is a fact for health.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

import msgspec

from agent.errors import IsolationError
from agent.isolation.channel import Channel, Frame, channel_pair
from agent.isolation.keeper import Backoff, Keeper, ignore
from agent.isolation.kernel import prctl
from agent.isolation.process import ExitStatus, ProcessHandle
from agent.isolation.sandbox import Limits, Profile, SandboxReport
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

__all__ = [
    "READY_TIMEOUT_S",
    "SPAWN_TIMEOUT_S",
    "Backoff",
    "ChildHandle",
    "ChildSpec",
    "ExitStatus",
    "Keeper",
    "ProcessHandle",
    "ProgramSpec",
    "Zygote",
]

READY_TIMEOUT_S = 60.0
SPAWN_TIMEOUT_S = 30.0
_PR_SET_CHILD_SUBREAPER = 36
_STATUS = msgspec.json.Decoder(Status)

# What the zygote and all children see of the environment: nothing of the agent's.
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "MALLOC_ARENA_MAX": "2",  # an arena costs 64 MiB of RLIMIT_AS
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RUST_BACKTRACE": "0",
}


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A sandboxed child.

    Attributes:
        profile: what it may ask of the kernel.
        entry: ``module:function``, the function taking a ``Child``; preload the module.
        limits: address space and descriptors.
        args: JSON values for the entry.
        fds: descriptors by name; duplicated, the caller keeps its own.
        connect_port: a TCP port of this host that it may connect to.
        landlock: False leaves the layer out, to test the other; refused where the sandbox is required.
        seccomp: as ``landlock``.
    """

    profile: Profile
    entry: str
    limits: Limits
    args: Mapping[str, Any] = field(default_factory=dict)
    fds: Mapping[str, int] = field(default_factory=dict)
    connect_port: int | None = None
    landlock: bool = True
    seccomp: bool = True


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """An external program under supervision: own user, limits, no new privileges, no sandbox; it dies with the agent.

    Attributes:
        argv: an absolute path, then the arguments; ``{fd:NAME}`` in one becomes the path of that descriptor.
        limits: address space and descriptors.
        env: its whole environment.
        fds: descriptors by name, inherited; the caller keeps its own.
    """

    argv: Sequence[str]
    limits: Limits
    env: Mapping[str, str] = field(default_factory=dict)
    fds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChildHandle:
    """A child in its sandbox.

    Attributes:
        process: its process.
        sock: the agent's end of the channel; the holder closes it, or gives it to a ``Channel`` or ``AsyncChannel``.
        report: what holds in the child.
    """

    process: ProcessHandle
    sock: socket.socket
    report: SandboxReport

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def pidfd(self) -> int:
        """A descriptor that stands for the process, and is readable when it has ended."""
        return self.process.pidfd

    async def wait(self) -> ExitStatus:
        """Wait for its end."""
        return await self.process.wait()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; nothing happens when it has ended."""
        self.process.kill(number)


class Zygote:
    """The fork server, seen from the agent. Get one by :meth:`start`."""

    def __init__(self, options: ZygoteOptions) -> None:
        self._options = options
        self._held: dict[int, ProcessHandle] = {}
        self._groups: set[int] = set()
        self._process, self._channel = self._launch()

    @classmethod
    def start(
        cls, preload: Sequence[str], *, user: tuple[int, int] | None = None, sandbox_required: bool = True
    ) -> Zygote:
        """Exec a zygote and wait until it has imported ``preload``. Blocks; call it first of all.

        Args:
            preload: modules that children will need: an import fails inside the sandbox.
            user: uid and gid for all children, when the agent runs as root.
            sandbox_required: children refuse to run without Landlock and seccomp.

        Raises:
            IsolationError: not called from the main thread, a module cannot be imported, or an import started a thread.
        """
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        zygote = cls(ZygoteOptions(-1, os.getpid(), tuple(preload), user, sandbox_required))
        try:
            select.select([zygote._channel.fileno()], [], [], READY_TIMEOUT_S)
            # A timeout of 0 leaves the socket non-blocking, so a zygote that hangs never holds up the agent's loop.
            zygote._expect_ready(zygote._channel.receive(0))
        except IsolationError:
            zygote.close()
            raise
        return zygote

    @property
    def pid(self) -> int:
        """The zygote's own pid."""
        return self._process.pid

    async def spawn(self, spec: ChildSpec) -> ChildHandle:
        """Start a child and wait until it is in its sandbox.

        Raises:
            IsolationError: the zygote is gone, or the child died or failed before it was confined.
        """
        ours, theirs = channel_pair()
        request = EntryRequest(
            spec.entry,
            spec.profile,
            spec.limits,
            dict(spec.args),
            tuple(spec.fds),
            spec.connect_port,
            spec.landlock,
            spec.seccomp,
        )
        try:
            process, report = await self._request(request, [theirs.fileno(), *spec.fds.values()])
            if report is None:
                raise IsolationError(f"{spec.entry}: the child ended before it was confined: {await process.wait()}")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ChildHandle(process, ours, report)

    async def spawn_program(self, spec: ProgramSpec) -> ProcessHandle:
        """Start an external program and wait until it has been exec'd.

        Raises:
            IsolationError: the zygote is gone, or the program cannot be run.
        """
        process, _ = await self._request(
            ProgramRequest(tuple(spec.argv), dict(spec.env), spec.limits, tuple(spec.fds)), list(spec.fds.values())
        )
        return process

    def adopt(self, pid: int) -> ProcessHandle:
        """Take charge of a child that a child of ours has forked (a policy worker), named by its pid.

        Raises:
            IsolationError: it is no child of this process, or is held already.
        """
        if pid in self._held or pid == self._process.pid:
            raise IsolationError(f"process {pid} is held already")
        try:
            # Peeks: answers for a child, dead or alive, and leaves it as it is.
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return self._hold(pid)
        except OSError as error:
            raise IsolationError(f"process {pid} is no child of the agent") from error

    async def run(
        self, on_death: Callable[[ExitStatus], None] = ignore, on_start: Callable[[ProcessHandle], None] = ignore
    ) -> Never:
        """Watch the zygote and exec a new one when it died; children that live are not touched. Needs the main thread.

        Args:
            on_death: told of each death, before the next start.
            on_start: told when a zygote serves, this one included.
        """
        await Keeper("zygote", self._relaunch).run(on_death, on_start)

    def close(self) -> None:
        """End the zygote and wait for it; its children live on."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _launch(self) -> tuple[subprocess.Popen[bytes], Channel]:
        if threading.current_thread() is not threading.main_thread():
            raise IsolationError(
                "the zygote must be started from the main thread: it dies with the thread that starts it"
            )
        ours, theirs = channel_pair()
        with theirs:
            options = msgspec.structs.replace(self._options, channel_fd=theirs.fileno())
            # -P: the working directory is not searched for modules. The path is this process's own.
            path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "agent.isolation.zygote", msgspec.json.encode(options).decode()],
                pass_fds=[theirs.fileno()],
                env={**_ENVIRONMENT, "PYTHONPATH": path},
                cwd="/",
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._groups.add(process.pid)
        return process, Channel(ours)

    async def _relaunch(self) -> ProcessHandle:
        if self._process.returncode is not None:
            self._channel.close()
            self._process, self._channel = self._launch()
            await _readable(self._channel.fileno(), READY_TIMEOUT_S)
            self._expect_ready(self._channel.receive(0))
        return self._hold(self._process.pid)

    def _expect_ready(self, frames: list[Frame] | None) -> None:
        match _decode(frames):
            case Ready():
                return
            case Failed(message=message):
                raise IsolationError(f"zygote: {message}")
            case _:
                raise IsolationError("zygote: it died before it was ready")

    async def _request(self, request: Request, fds: Sequence[int]) -> tuple[ProcessHandle, SandboxReport | None]:
        """Send a request and follow its status until the child is confined, has exec'd (None) or died (None)."""
        ours, theirs = channel_pair()
        status = Channel(ours)
        process: ProcessHandle | None = None
        try:
            with theirs:
                self._channel.send(msgspec.json.encode(request), [theirs.fileno(), *fds])
            deadline = asyncio.get_running_loop().time() + SPAWN_TIMEOUT_S
            while True:
                await _readable(ours.fileno(), deadline - asyncio.get_running_loop().time())
                match _decode(status.receive(0)):
                    case Forked(pid=pid):
                        process = self._hold(pid)
                    case Confined(report=report) if process is not None:
                        return process, report
                    case Failed(message=message):
                        raise IsolationError(message)
                    case None if process is not None:
                        return process, None
                    case _:
                        raise IsolationError("the zygote died")
        except BaseException:
            if process is not None:
                process.kill()
                await process.wait()
            raise
        finally:
            status.close()

    def _hold(self, pid: int) -> ProcessHandle:
        process = ProcessHandle(pid, self._released)
        self._held[pid] = process
        return process

    def _released(self, process: ProcessHandle) -> None:
        del self._held[process.pid]
        if process.pid == self._process.pid and process.status is not None:
            self._process.returncode = process.status.code or 0  # tells Popen that nothing is left to wait for
        self._reap_strays()

    def _reap_strays(self) -> None:
        """Reap dead descendants that nobody holds, lest a template that forks without end fills the process table."""
        for group in list(self._groups):
            try:
                while (info := os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                    if info.si_pid in self._held or info.si_pid == self._process.pid:
                        break  # its handle reaps it, and then looks here again
                    os.waitid(os.P_PID, info.si_pid, os.WEXITED)
            except ChildProcessError:
                if group != self._process.pid:
                    self._groups.discard(group)


def _decode(frames: list[Frame] | None) -> Status | None:
    if frames is None:
        return None
    for frame in frames:
        frame.close_fds()
    try:
        status: Status = _STATUS.decode(frames[0].data)
    except (ValueError, RecursionError, IndexError) as error:
        raise IsolationError(f"a status message is malformed: {error}") from error
    return status


async def _readable(fd: int, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ready.wait()
    except TimeoutError as error:
        raise IsolationError(f"no answer within {timeout_s:.0f} s") from error
    finally:
        loop.remove_reader(fd)
