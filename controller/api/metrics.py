"""Health and metrics of one replica, on a listener of their own for the machine's monitoring.

Rules:

1. Loopback alone, without TLS; it reads, and nothing can be changed or found out by it but the fleet's figures.
2. ``/healthz``: the process lives. ``/readyz``: 200, or 503 with the reason. ``/metrics``: Prometheus' text.
3. No label holds what a node, an operator or anybody else chooses; a hook is named by its id, which is ours.
4. At most :data:`MAX_CONNECTIONS` are open; with one more the oldest is cut, so that nobody on the machine takes the controller's descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from agent.errors import ConfigError, HostError
from controller import __version__
from controller.flows.deliver import Deliverer
from controller.flows.polling import PollCounts
from controller.flows.watching import Watch
from controller.metrics import Figures, Histogram, Tally
from controller.store.database import Database

__all__ = ["MAX_CONNECTIONS", "ReplicaMetrics", "metrics_application", "serve_metrics"]

MAX_CONNECTIONS = 32
_PREFIX = "edgewarden_controller_"
_Labels = TypeVar("_Labels", bound=tuple[str, ...])


@dataclass(frozen=True, slots=True, eq=False)  # a registry keeps collectors by identity
class ReplicaMetrics(Collector):
    """All that this replica has to say about itself and the fleet.

    Attributes:
        until_s: when the controller's own certificates expire, in seconds since the epoch, by the name of their files.
    """

    figures: Figures
    polls: PollCounts
    deliverer: Deliverer
    database: Database
    watch: Watch
    until_s: Mapping[str, float]

    def collect(self) -> Iterable[Metric]:
        """Give Prometheus what there is."""
        yield _gauge("info", "This replica's version", {(__version__,): 1.0}, "version")
        yield _gauge("ready", "1 while this replica can do its work", {(): float(not self.watch.why_not())})
        yield _counter("polls", "Polls that were begun", self.polls.polls)
        yield _counter("unreachable", "Polls that ended without Evidence, and pushes that did not come", self.polls.unreachable)  # fmt: skip
        yield _histogram("poll_lag", "How late a poll was begun", self.polls.lag_s)
        yield _tally("appraisals", "Appraisals by status", self.figures.appraisals)
        yield _histogram("appraisal", "Time for one appraisal", self.figures.appraisal_s)
        yield _tally("enrolments", "Calls of nodes that join, by step, outcome and check", self.figures.enrolments)
        yield _tally("calls", "Answers to nodes and operators, by route and status", self.figures.calls)
        yield _tally("deliveries", "Attempts to deliver an event, by outcome", self.deliverer.counts)
        yield _counter("database_errors", "Transactions that the database failed", self.database.errors)
        until = {(name,): value for name, value in self.until_s.items()}
        yield _gauge(
            "certificate_until_seconds", "When a certificate of the controller's own expires", until, "certificate"
        )
        yield from self._sampled()
        yield from _process()

    def _sampled(self) -> Iterator[Metric]:
        """What the database said last; it is the fleet's, and the same from every replica."""
        sample = self.watch.sample
        if sample is None:
            return
        nodes = {
            (status, "true" if reached else "false"): float(count) for (status, reached), count in sample.nodes.items()
        }
        yield _gauge("nodes", "Nodes by the status of their last result and whether they answered last time", nodes, "status", "reached")  # fmt: skip
        depths = {(one.sink,): float(one.depth) for one in sample.backlogs}
        yield _gauge("outbox_events", "Events that wait for delivery", depths, "sink")
        ages = {(one.sink,): one.oldest_s for one in sample.backlogs}
        yield _gauge("outbox_oldest_seconds", "Age of the oldest event that waits", ages, "sink")
        beats = {(name,): age_s for name, age_s in sample.replicas.items()}
        yield _gauge("replica_heartbeat_age_seconds", "Since each replica's last heartbeat", beats, "replica")

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _process() -> Iterator[Metric]:
    """This process, under the names that Prometheus' own clients use; they want /proc/stat, which the unit hides."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    yield CounterMetricFamily("process_cpu_seconds", "CPU time", value=used.ru_utime + used.ru_stime)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    yield GaugeMetricFamily("process_resident_memory_bytes", "Memory", value=pages * resource.getpagesize())
    yield GaugeMetricFamily("process_open_fds", "Descriptors", value=sum(1 for _ in Path("/proc/self/fd").iterdir()))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield GaugeMetricFamily("process_max_fds", "Most descriptors", value=limit)


def _gauge(name: str, words: str, values: Mapping[_Labels, float], *labels: str) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, words, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, words: str, value: int) -> Metric:
    return CounterMetricFamily(_PREFIX + name, words, value=value)


def _tally(name: str, words: str, tally: Tally) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, words, labels=tally.labels)
    for key, value in tally:
        family.add_metric(key, value)
    return family


def _histogram(name: str, words: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(f"{_PREFIX}{name}_seconds", words)
    family.add_metric([], histogram.buckets(), sum_value=histogram.sum)
    return family


def metrics_application(watch: Watch, metrics: ReplicaMetrics) -> web.Application:
    """Serve ``/healthz``, ``/readyz`` and ``/metrics``."""

    async def alive(_: web.Request) -> web.Response:
        return web.json_response({"holds": True, "why": "the process lives"})

    async def ready(_: web.Request) -> web.Response:
        why = watch.why_not()
        status = 503 if why else 200
        return web.json_response({"holds": not why, "why": why or "database and polling do their work"}, status=status)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application(client_max_size=1024)
    application.add_routes([web.get("/healthz", alive), web.get("/readyz", ready), web.get("/metrics", scrape)])
    return application


@contextlib.asynccontextmanager
async def serve_metrics(application: web.Application, address: tuple[str, int]) -> AsyncIterator[int]:
    """Serve until the block ends; gives the port.

    Raises:
        ConfigError: the address can't be bound.
        HostError: the server can't be made.
    """
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0)
    await runner.setup()
    try:
        server = runner.server
        if server is None:
            raise HostError("metrics.listen: the listener can't be served")

        loop = asyncio.get_running_loop()

        def make_room() -> None:
            for oldest in server.connections[: 1 - MAX_CONNECTIONS]:
                if oldest.transport is not None:
                    oldest.transport.abort()

        def connect() -> RequestHandler:
            loop.call_soon(make_room)  # of those that are accepted in the same turn, the earlier ones are known by then
            return server()

        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            sock = socket.create_server(address, family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise ConfigError(f"metrics.listen: {address[0]}:{address[1]}: {error.strerror}") from error
        listener = await loop.create_server(connect, sock=sock)
        try:
            yield sock.getsockname()[1]
        finally:
            listener.close()
    finally:
        await runner.cleanup()
