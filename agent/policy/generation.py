"""One policy on the agent's side: its template process, and the workers that it forks.

Rules:

1. The digest is taken here, over the sealed bytes that the template then reads; the template's own word is compared with it.
2. A template that does not say within the load deadline that it is ready is killed, and the bundle refused: its parser or its
   rules run too long.
3. A template that died is started again from the same sealed bytes when the next worker is wanted; workers that live go on.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from socket import socket

import msgspec

from agent.errors import ConfigError, EdgeWardenError, IsolationError, PolicyError, VerificationError
from agent.isolation.channel import AsyncChannel, Frame, channel_pair
from agent.isolation.memfd import SealedFile, seal_bytes
from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildHandle, ChildSpec, ProcessHandle, Zygote
from agent.policy.bundle import MAX_BUNDLE_BYTES
from agent.policy.messages import Endpoint, stamp_memory
from agent.policy.opa_server import OpaProgram, OpaServer
from agent.policy.template import Forked, Loaded, Refused, Report, TemplateArgs

__all__ = ["LIMITS", "PRELOAD", "Generation", "Worker"]

PRELOAD = ("agent.policy.worker",)
LIMITS = Limits(headroom_bytes=768 << 20, open_files=64)
_FORK_TIMEOUT_S = 5.0
_ENTRY = "agent.policy.worker:template"
_REPORT = msgspec.json.Decoder(Report)
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that runs: its process, and the end that its asker gets."""

    process: ProcessHandle
    endpoint: Endpoint


class _Template:
    """A template process and the one request that is under way."""

    def __init__(self, handle: ChildHandle) -> None:
        self.handle = handle
        self._reply: asyncio.Future[Report] | None = None
        self.channel = AsyncChannel(handle.sock, self._on_frame, self._on_close)

    async def reply(self, timeout_s: float) -> Report:
        """Wait for the template's next report.

        Raises:
            IsolationError: it died, does not answer, or talks nonsense; it is killed then.
        """
        try:
            self._reply = asyncio.get_running_loop().create_future()
            return await asyncio.wait_for(self._reply, timeout_s)
        except TimeoutError as error:
            self.close()
            raise IsolationError(f"the policy template did not answer within {timeout_s:g} s") from error

    def close(self) -> None:
        """End it."""
        self.handle.kill()
        self.channel.close()

    def _on_frame(self, frame: Frame) -> None:
        frame.close_fds()
        if self._reply is None or self._reply.done():
            return
        try:
            self._reply.set_result(_REPORT.decode(frame.data))
        except (ValueError, RecursionError) as error:
            self._reply.set_exception(IsolationError(f"the policy template's report is malformed: {error}"))

    def _on_close(self) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(IsolationError("the policy template died"))


class Generation:
    """A bundle, loaded. Get one by :meth:`load`; whoever holds it closes it.

    Attributes:
        revision: what the bundle calls itself.
        sha256: digest of the bundle's bytes.
    """

    def __init__(self, zygote: Zygote, sealed: SealedFile, args: TemplateArgs, limits: Limits, load_s: float) -> None:
        self._zygote = zygote
        self._sealed = sealed
        self._args = args
        self._limits = limits
        self._load_s = load_s
        self._template: _Template | None = None
        self._server: OpaServer | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        self.revision = ""
        self._request_reads: tuple[str, ...] | None = None
        self.sha256 = sealed.sha256

    @classmethod
    async def load(
        cls,
        zygote: Zygote,
        bundle: bytes,
        *,
        trusted_keys: Sequence[bytes],
        limits: Limits,
        load_timeout_s: float,
        opa: OpaProgram | None = None,
    ) -> Generation:
        """Start a template for a bundle and wait until it has evaluated every package.

        Raises:
            PolicyError: the bundle is refused, or loading it takes too long, or too much memory.
            VerificationError: it is malformed, or not signed by a trusted key.
            ConfigError: a trusted key cannot be read.
            IsolationError: no process can be had.
        """
        if len(bundle) > MAX_BUNDLE_BYTES:
            raise PolicyError(f"the bundle has {len(bundle)} bytes, over {MAX_BUNDLE_BYTES}")
        args = TemplateArgs(tuple(key.decode("ascii", "replace") for key in trusted_keys))
        generation = cls(zygote, seal_bytes("policy", bundle), args, limits, load_timeout_s)
        try:
            if opa is not None:
                generation._server = await OpaServer.start(zygote, opa, generation._sealed)
            await generation._ready_template()
        except BaseException:
            generation.close()
            raise
        return generation

    async def fork(self) -> Worker:
        """Fork one worker.

        Raises:
            IsolationError: no process can be had.
            EdgeWardenError: the template had died, and its successor refuses the bundle.
        """
        ours, theirs = channel_pair()
        stamp_fd = stamp_memory()
        try:
            async with self._turn:
                template = await self._ready_template()
                template.channel.send(b"fork", [theirs.fileno(), stamp_fd])
                report = await template.reply(_FORK_TIMEOUT_S)
            if not isinstance(report, Forked):
                raise IsolationError(f"the policy template cannot fork: {report}")
            process = self._zygote.adopt(report.pid)
        except BaseException:
            ours.close()
            os.close(stamp_fd)
            raise
        finally:
            theirs.close()
        return Worker(process, self._endpoint(ours, stamp_fd))

    def _endpoint(self, sock: socket, stamp_fd: int) -> Endpoint:
        return Endpoint(next(_numbers), sock, stamp_fd, self.sha256, self.revision, self._request_reads)

    def close(self) -> None:
        """End the template, and the OPA server when there is one; workers end when their askers close."""
        if self._closed:
            return
        self._closed = True
        if self._template is not None:
            self._template.close()
        if self._server is not None:
            self._server.close()
        self._sealed.close()

    async def _ready_template(self) -> _Template:
        if self._closed:
            raise IsolationError("this policy is retired")
        if self._template is None or self._template.channel.closed:
            self._template = await self._start()
        return self._template

    async def _start(self) -> _Template:
        args, port = self._args, None
        if self._server is not None:
            args = msgspec.structs.replace(args, opa=self._server.access)
            port = self._server.access.port
        spec = ChildSpec(
            Profile.POLICY_TEMPLATE,
            _ENTRY,
            self._limits,
            args=msgspec.to_builtins(args),
            fds={"bundle": self._sealed.fd},
            connect_port=port,
        )
        template = _Template(await self._zygote.spawn(spec))
        try:
            self._accept(await self._first_report(template))
        except BaseException:
            template.close()
            raise
        return template

    async def _first_report(self, template: _Template) -> Report:
        try:
            return await template.reply(self._load_s)
        except IsolationError as error:
            template.close()
            raise PolicyError(f"the bundle cannot be loaded: {error} ({await template.handle.wait()})") from error

    def _accept(self, report: Report) -> None:
        match report:
            case Loaded(revision=revision, sha256=sha256, request_reads=request_reads):
                if sha256 != self.sha256:
                    raise PolicyError("the policy template read other bytes than it was given")
                self.revision = revision
                self._request_reads = request_reads
            case Refused(kind=kind, reason=reason):
                raise _refusal(kind, reason)
            case _:
                raise PolicyError("the policy template answers what it was not asked")


def _refusal(kind: str, reason: str) -> EdgeWardenError:
    match kind:
        case "verification":
            check, _, message = reason.partition(": ")
            return VerificationError(check, message)
        case "config":
            return ConfigError(reason)
        case "isolation":
            return IsolationError(reason)
        case _:
            return PolicyError(reason)
