"""Start, run and stop the agent.

Rules:

1. The order of a start: the state is locked, sockets are bound and the zygote is exec'd before any secret or TPM is opened; then the
   configuration's files are read and checked; then audit log, TPM, measurement log, configuration measured, policy, models, gateway. No port
   is open before the models are handed over.
2. The first task that fails stops the process; shutdown has two stages: requests drain, then everything ends.
3. A TPM reset under the running agent ends the process: what is loaded is no longer in the log of this boot. The service manager starts it
   again, and everything is measured anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from aiohttp import web

from agent import clock
from agent.attest.log import TpmResetError
from agent.audit.log import AuditLog
from agent.config import Environment, Settings
from agent.control.health import health_application
from agent.control.keylime import keylime_application
from agent.control.serving import Surface
from agent.control.surface import admin_application
from agent.daemon.assembly import assemble
from agent.daemon.control import ControlListener
from agent.daemon.keylime import KeylimeMode
from agent.daemon.node import Node
from agent.daemon.provision import (
    Listeners,
    audit_space,
    bind_listeners,
    child_user,
    lock_state,
    make_directory,
)
from agent.errors import AuditError, EdgeWardenError, HostError, VerificationError
from agent.host.notify import Notifier
from agent.host.watch import StoreWatcher
from agent.isolation.supervisor import Zygote
from agent.records import AuditEvent

__all__ = ["PRELOAD", "run"]

# What children import, and what libraries would import later, when there is no file system any more. Not the inspector, which is there for a
# moment: it imports its own in a tenth of a second, before its sandbox, and no other process carries it.
PRELOAD: Final = (
    "agent.gateway.entry",
    "agent.policy.worker",
    "cryptography.hazmat.backends.openssl.backend",
    "encodings.idna",
)
TPM_CHECK_S: Final = 10.0
MAX_ERROR_CHARS: Final = 2000
MODEL_RETRY_S: Final = 5.0
MAX_MODEL_RETRY_S: Final = 60.0
HEALTH_CHECK_S: Final = 1.0
_log = structlog.get_logger(__name__)


def run(settings: Settings, environment: Environment) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        EdgeWardenError: what stopped it.
    """
    lock = lock_state(Path(settings.node.state_dir))
    listeners = bind_listeners(settings)
    failure: BaseException | None = None
    try:
        # Before any secret is opened; blocks until everything is imported.
        zygote = Zygote.start(PRELOAD, user=child_user(settings), sandbox_required=settings.sandbox.required)
        try:
            uvloop.run(_Agent(settings, environment, listeners, zygote).run())
        except* EdgeWardenError as group:
            failure = _first(group)  # raised below: before Python 3.11.4 what is raised here gets a group around it
        finally:
            zygote.close()
    finally:
        listeners.close()
        os.close(lock)
    if failure is not None:
        raise failure from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


class _Agent:
    def __init__(self, settings: Settings, environment: Environment, listeners: Listeners, zygote: Zygote) -> None:
        self._settings = settings
        self._listeners = listeners
        self._control: tuple[ssl.SSLContext, str] | None = None
        self._keylime: KeylimeMode | None = None
        self._zygote = zygote
        self._state = Path(settings.node.state_dir)
        self._notifier = Notifier(environment.notify_socket)
        self._watchdog_s = (environment.watchdog_usec or 0) / 2e6 or HEALTH_CHECK_S
        self._stop = asyncio.Event()
        self._running: set[asyncio.Task[object]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        settings = self._settings
        audit = await AuditLog.open(
            self._state / "audit",
            settings.node.id,
            durability=settings.audit.durability,
            space=audit_space(settings.audit.max_bytes),
        )
        try:
            async with contextlib.AsyncExitStack() as stack:
                await self._live(stack, audit)
        except* EdgeWardenError as group:
            await _record_failure(audit, str(_first(group)))
            raise
        finally:
            await audit.close()

    async def _live(self, stack: contextlib.AsyncExitStack, audit: AuditLog) -> None:
        assembly = await assemble(stack, self._settings, self._zygote, self._listeners, audit)
        self._control, self._keylime, node = assembly.control, assembly.keylime, assembly.node
        async with asyncio.TaskGroup() as self._tasks:
            for service in (self._zygote.run(), node.pool.run(), audit.run()):
                self._run(service)
            try:
                self._run(self._bring_up(node, stack))
                await self._stop.wait()  # counts during a start that does not come to its end, too
                await self._shut_down(node)
            finally:
                for task in self._running:
                    task.cancel()

    def _run(self, work: Coroutine[Any, Any, object]) -> None:
        """Run work until the end of the process: its failure is the process's."""
        _ = self._task(work)

    def _task(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Run work, which may be cancelled earlier than the process ends, as :meth:`_run` does."""
        task = self._tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _bring_up(self, node: Node, stack: contextlib.AsyncExitStack) -> None:
        settings = self._settings
        await node.membership.restore()
        node.report_trust()
        await node.record(AuditEvent(kind="node.start", time_us=clock.now_us(), outcome="ok", principal="edgewarden"))
        # The operator can ask for the reason while the rest is still on its way.
        await self._serve(stack, health_application(node.health, node.metrics), self._listeners.health_unix)
        if self._listeners.metrics:
            await self._serve(stack, health_application(node.health, node.metrics), self._listeners.metrics)
        await node.policies.start(Path(settings.policy.bundle))
        node.health.report("enforcing", holds=True, why=f"policy {node.policies.status()['revision']}")
        store = Path(settings.models.store)
        make_directory("models.store", store)
        # Before the packages are read, so that no change is missed in between.
        watcher = StoreWatcher(store, lambda name, version: self._look_again(node, name, version))
        node.models_changed.clear()
        await node.models.scan()
        self._run(node.dataplane.run())
        await node.dataplane.wait_ready()
        await self._serve(stack, admin_application(node), self._listeners.admin_unix)
        await self._serve_controller(node, stack)
        if self._keylime and node.keylime and self._listeners.keylime:
            keylime = keylime_application(node.keylime)
            await self._serve(stack, keylime, self._listeners.keylime, self._keylime.context)
            self._run(node.keylime.enrol())
        self._run(watcher.run())
        self._run(self._check_tpm(node))
        self._run(self._retry_models(node))
        self._run(self._keep_alive(node))
        host, port = self._listeners.inference.getsockname()[:2]
        self._notifier.ready()
        self._notifier.status(f"serving on {host}:{port}")
        _log.info("serving", address=host, port=port, models=len(node.dataplane.models))

    async def _serve_controller(self, node: Node, stack: contextlib.AsyncExitStack) -> None:
        listener = ControlListener(self._listeners.control, node) if self._listeners.control else None
        stack.push_async_callback(node.membership.stop)
        if listener and self._control:
            stack.push_async_callback(listener.stop)
            await listener.serve_configured(*self._control)
            listener = None
        await node.membership.start(listener, self._task)
        self._run(self._follow_trust(node))

    async def _follow_trust(self, node: Node) -> None:
        """Look at the models again when the controller's opinion changes what may be loaded."""
        while True:
            await node.models_changed.wait()
            node.models_changed.clear()
            if not await _logged(node.models.scan()):
                node.models_changed.set()
                await asyncio.sleep(MODEL_RETRY_S)

    async def _serve(
        self,
        stack: contextlib.AsyncExitStack,
        application: web.Application,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
    ) -> None:
        runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        if runner.server is None:
            raise HostError("a surface of the agent can't be served")
        surface = Surface(runner.server, sock, context)
        surface.start()
        stack.callback(surface.stop)

    def _look_again(self, node: Node, name: str, version: str) -> None:
        if not self._stop.is_set():
            self._run(_logged(node.models.changed(name, version), model=name, version=version))

    async def _check_tpm(self, node: Node) -> None:
        """Keep the fact ``attested``: the TPM answers and still holds what the log says."""
        while True:
            await asyncio.sleep(TPM_CHECK_S)
            if node.keylime:
                await node.keylime.check()
            try:
                await node.check_attested()
            except TpmResetError:
                raise
            except (HostError, VerificationError):
                continue  # the health says it, and nothing is measured meanwhile

    async def _retry_models(self, node: Node) -> None:
        """Take up again what failed for a reason of the host's."""
        delay_s = MODEL_RETRY_S
        while True:
            await asyncio.sleep(delay_s)
            settled = await _logged(node.models.retry())
            delay_s = MODEL_RETRY_S if settled else min(2 * delay_s, MAX_MODEL_RETRY_S)

    async def _keep_alive(self, node: Node) -> None:
        while True:
            self._notifier.watchdog()
            node.report_log()
            node.report_trust()
            loops = [
                name
                for name, holds in (("gateway", node.dataplane.crash_loop), ("policy", node.pool.crash_loop))
                if holds
            ]
            node.health.detail("crash_loops", list(loops))
            # Also without a record to write: a full disk that has room again is news.
            node.health.report("log_durable", holds=node.audit.durable, why=node.audit.failure or "records are durable")
            await asyncio.sleep(min(self._watchdog_s, HEALTH_CHECK_S))

    async def _shut_down(self, node: Node) -> None:
        self._notifier.stopping()
        node.health.report("ready", holds=False, why="the agent is stopping")
        await node.dataplane.drain(self._settings.inference.drain_timeout_ms / 1000)
        await node.record(AuditEvent(kind="node.stop", time_us=clock.now_us(), outcome="ok", principal="edgewarden"))


async def _record_failure(audit: AuditLog, error: str) -> None:
    """Record what ends the agent, where the log can still take it."""
    failure = AuditEvent(
        kind="node.fail",
        time_us=clock.now_us(),
        outcome="failed",
        principal="edgewarden",
        error=error[:MAX_ERROR_CHARS],
    )
    with contextlib.suppress(AuditError):
        await audit.append(failure)


async def _logged(work: Coroutine[Any, Any, None], **fields: str) -> bool:
    """Run work whose failure is the host's, not ours: what it would have changed stays out of service. False: it failed."""
    try:
        await work
    except TpmResetError:
        raise
    except EdgeWardenError as error:
        _log.error("model_check_failed", error=str(error), **fields)
        return False
    return True
