"""Build one replica of the controller and run it: listeners, poller, housekeeping.

Rules:

1. The first task that fails stops the process; the service manager starts it again, and nothing that was acknowledged is lost.
2. A replica says in the database that it lives; the others notice when it does not any more, unless it has ended in order.
3. Health and metrics are served before the rest, so that what keeps the rest from its work can be asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from cryptography import x509

from agent import clock
from agent.errors import ConfigError, HostError
from agent.host.notify import Notifier
from controller import __version__
from controller.api import listening, metrics
from controller.api.nodes import node_routes, readiness_route
from controller.api.openapi import document
from controller.api.operators import Operators
from controller.api.refusals import Refusals
from controller.api.routing import Call, Route, Surface
from controller.flows.appraising import Appraiser
from controller.flows.deliver import Deliverer
from controller.flows.joining import Joining
from controller.flows.polling import Poller
from controller.flows.presence import Presence
from controller.flows.watching import Watch
from controller.metrics import Figures
from controller.settings import Settings, split_listen
from controller.store import audit
from controller.store import joining as joining_store
from controller.store.database import Database, StoreError
from controller.trust.authority import Authority
from controller.trust.authorize import Authorizer
from controller.trust.endorsement import load_allowlist, load_roots
from controller.trust.oidc import OidcReader

__all__ = ["Controller", "run"]

HEARTBEAT_S = 5.0
MAX_CONNECTIONS = 4096  # of nodes and operators at a time; each call is one, or a few on one
SHUTDOWN_S = 10.0
_log = structlog.get_logger(__name__)


class Controller:
    """One replica. Use :meth:`running` inside the event loop.

    Args:
        settings: of this replica.
        notifier: speaks to the service manager; to nobody by default.
        watchdog_s: how long the service manager waits for a sign of life; None: it does not.

    Attributes:
        port, metrics_port: where it listens; 0: not yet, or not at all.
    """

    def __init__(self, settings: Settings, notifier: Notifier | None = None, watchdog_s: float | None = None) -> None:
        self._settings = settings
        self._notifier = notifier or Notifier(None)
        self._watchdog_s = watchdog_s
        self.id = secrets.token_hex(16)
        self.port = 0
        self.metrics_port = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.TaskGroup]:
        """Serve until the block ends; a task that fails ends it."""
        settings = self._settings
        authority = Authority.load(Path(settings.keys), settings.trust_domain)
        context = listener_context(authority)
        roots = load_roots(settings.enrolment.ek_roots)
        allowlist = load_allowlist(settings.enrolment.ek_allowlist)
        async with contextlib.AsyncExitStack() as stack:
            database = await Database.open(settings.database)
            stack.push_async_callback(database.close)
            figures = Figures()
            appraiser = Appraiser(authority, figures, nats=settings.nats is not None)
            poller = Poller(database, appraiser, authority, settings.poll)
            deliverer = Deliverer(database, settings.nats)
            watch = Watch(database, poller, settings.poll, self._notifier)
            found = metrics.ReplicaMetrics(figures, poller.counts, deliverer, database, watch, _expiries(authority))
            await self._serve_metrics(stack, watch, found)
            join = Joining(database, appraiser, authority, settings, roots, allowlist)
            routes = [
                *node_routes(join, authority, settings.enrolment.per_minute, settings.poll.max_evidence_bytes),
                *Operators(database, authority, appraiser, poller, settings).routes(),
            ]
            routes.append(readiness_route(watch.why_not))
            routes.append(_description(routes, settings.url))
            tokens = OidcReader(settings.oidc).read if settings.oidc else None
            authorizer = Authorizer()
            stack.callback(authorizer.close)
            refusals = Refusals()
            surface = Surface(database, authorizer, tokens, figures, refusals)
            await self._serve(stack, surface.application(routes), context)
            name = f"{socket.gethostname()}:{os.getpid()}"
            presence = Presence(database, self.id, name, nats=settings.nats is not None)
            async with asyncio.TaskGroup() as group:
                work = (
                    poller.run(),
                    deliverer.run(),
                    self._keep_house(database, presence, refusals),
                    watch.run(),
                    watch.keep_alive(self._watchdog_s),
                )
                tasks = [group.create_task(one) for one in work]
                self._notifier.ready()
                _log.info(
                    "serving", port=self.port, metrics_port=self.metrics_port, replica=self.id, version=__version__
                )
                yield group
                watch.stop()
                for task in tasks:
                    task.cancel()
            await presence.leave()

    async def _serve(
        self, stack: contextlib.AsyncExitStack, application: web.Application, context: ssl.SSLContext
    ) -> None:
        host, _, port = self._settings.listen.rpartition(":")
        if not (port.isascii() and port.isdigit()):
            raise ConfigError(f"listen: {self._settings.listen!r} is not ADDRESS:PORT")
        sock = listening.bind("listen", host.strip("[]"), int(port))
        self.port = sock.getsockname()[1]
        serving = listening.serve(application, sock, most=MAX_CONNECTIONS, context=context, shutdown_s=SHUTDOWN_S)
        await stack.enter_async_context(serving)

    async def _serve_metrics(
        self, stack: contextlib.AsyncExitStack, watch: Watch, found: metrics.ReplicaMetrics
    ) -> None:
        if self._settings.metrics.listen is not None:
            sock = listening.bind("metrics.listen", *split_listen("metrics.listen", self._settings.metrics.listen))
            self.metrics_port = sock.getsockname()[1]
            application = metrics.metrics_application(watch, found)
            await stack.enter_async_context(listening.serve(application, sock, most=metrics.MAX_CONNECTIONS))

    async def _keep_house(self, database: Database, presence: Presence, refusals: Refusals) -> None:
        """Say that this replica lives, notice those that do not, delete what has expired, tell of refusals that have no record of their own."""
        while True:
            try:
                await presence.beat()
                async with database.begin() as connection:
                    await joining_store.sweep(connection, clock.now_us())
                await _tell_refusals(database, refusals)
            except StoreError as error:
                _log.error("database_lost", error=str(error))
            await asyncio.sleep(HEARTBEAT_S)


async def _tell_refusals(database: Database, refusals: Refusals) -> None:
    if counts := refusals.counted():
        detail = {"count": counts.total(), "checks": dict(counts)}
        entry = audit.AuditEntry(kind="refusals", principal="controller", outcome="refused", detail=detail)
        async with database.begin() as connection:
            await audit.append(connection, entry)
        refusals.told(counts)
        _log.warning("calls_refused", **detail)


def _expiries(authority: Authority) -> dict[str, float]:
    server = x509.load_pem_x509_certificate(authority.server_files[0].read_bytes())
    certificates = {"ca.pem": authority.certificate, "server.pem": server}
    return {name: certificate.not_valid_after_utc.timestamp() for name, certificate in certificates.items()}


def _description(routes: list[Route], url: str) -> Route:
    async def describe(_call: Call) -> object:
        return document([*routes, own], url)

    own = Route("GET", "/openapi.json", "This description", describe, answer=dict[str, Any])
    return own


def listener_context(authority: Authority) -> ssl.SSLContext:
    """Return the listener's TLS: 1.3, client certificates of the controller's CA, which are optional.

    Raises:
        ConfigError: the files do not load.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    try:
        context.load_cert_chain(*authority.server_files)
        context.load_verify_locations(cadata=authority.ca_pem)
    except OSError as error:
        raise ConfigError(f"keys: server.pem, server.key: {error}") from error
    return context


def run(settings: Settings, notifier: Notifier, watchdog_s: float | None) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        settings: of this replica.
        notifier: speaks to the service manager.
        watchdog_s: how long that waits for a sign of life; None: it does not.

    Raises:
        ConfigError, HostError: what stands in the way of a start.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with Controller(settings, notifier, watchdog_s).running():
            await stop.wait()

    import uvloop  # noqa: PLC0415 -- the other verbs need no event loop

    failure: BaseException | None = None
    try:
        uvloop.run(main())
    except BaseExceptionGroup as group:
        failure = group.exceptions[0]
    if isinstance(failure, HostError | ConfigError):
        raise failure
    if failure is not None:
        raise HostError(f"the controller failed: {failure!r}") from failure
