"""Deliver: take what is due from the outbox, send it to hooks and to NATS, keep how it ended.

Rules:

1. A webhook is signed as the Standard Webhooks specification says: HMAC-SHA256 over ``id.timestamp.body``. ``webhook-id`` is the event's id in each
   attempt, so a receiver tells a repetition by it.
2. A receiver's certificate is verified; no redirect is followed, no proxy of the environment used, no cookie kept, nothing decompressed.
3. A receiver has one time limit for all of an attempt, and of its answer :data:`MAX_ANSWER_BYTES` are read.
4. 2xx is delivered; 410 disables the hook; everything else is tried again.
5. Each hook is served by a task of its own, NATS by another: one that is slow or down holds up nobody else.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import ssl
from collections.abc import Awaitable, Callable, Sequence

import aiohttp
import structlog

from agent import clock
from controller.flows.jetstream import JetStream, StreamError
from controller.metrics import Tally
from controller.settings import NatsSettings
from controller.store import outbox
from controller.store.database import Database, StoreError
from controller.store.outbox import Delivery, Outcome

__all__ = ["Deliverer", "sign"]

TIMEOUT_S = 10  # for one attempt, from the look-up of the name to the end of the answer
MAX_ANSWER_BYTES = 4096
HOOK_BATCH = 8  # attempts at a time to one hook
NATS_BATCH = 64
IDLE_S = 0.5  # between two looks for what is due
RETRY_S = 5.0  # after the database or NATS was not there
RETIRE_S = 3600.0
_GONE = 410
_log = structlog.get_logger(__name__)


def sign(secret: bytes, event: str, timestamp_s: int, body: bytes) -> str:
    """Return ``webhook-signature`` (Standard Webhooks 1.0.0, symmetric signature)."""
    signed = b"%s.%d.%s" % (event.encode(), timestamp_s, body)
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


class Deliverer:
    """One replica's delivery of events.

    Args:
        database: where the outbox is.
        nats: where else events go.
        context: how receivers are verified; the system's CAs without it.

    Attributes:
        counts: attempts by sink (``hook``, ``nats``) and outcome (``delivered``, ``failed``, ``given_up``).
    """

    def __init__(
        self, database: Database, nats: NatsSettings | None = None, context: ssl.SSLContext | None = None
    ) -> None:
        self._database = database
        self._stream = None if nats is None else JetStream(nats)
        self._context = context or ssl.create_default_context()
        self._serving: dict[str, asyncio.Task[None]] = {}
        self.counts = Tally("sink", "outcome")

    async def run(self) -> None:
        """Deliver until cancelled. A database that does not answer is waited for."""
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._context),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(self._repeat("retire", RETIRE_S, self._retire))
            group.create_task(self._repeat("hooks", IDLE_S, functools.partial(self._serve_hooks, group, session)))
            if self._stream is not None:
                group.create_task(self._serve_nats(self._stream))

    async def _repeat(self, what: str, pause_s: float, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except StoreError as error:
                _log.error("delivery_paused", what=what, error=str(error))
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(pause_s)

    async def _retire(self) -> None:
        async with self._database.begin() as connection:
            removed = await outbox.retire(connection, clock.now_us(), nats=self._stream is not None)
        if removed:
            _log.info("events_removed", count=removed)

    async def _serve_hooks(self, group: asyncio.TaskGroup, session: aiohttp.ClientSession) -> None:
        async with self._database.begin() as connection:
            due = await outbox.waiting(connection, clock.now_us())
        for hook in due:
            if hook not in self._serving:
                self._serving[hook] = group.create_task(self._serve_hook(hook, session))

    async def _serve_hook(self, hook: str, session: aiohttp.ClientSession) -> None:
        try:
            await self._drain(hook, HOOK_BATCH, functools.partial(self._send, session))
        except StoreError as error:  # leases end, and then it is tried again
            _log.error("delivery_paused", what=hook, error=str(error))
        finally:
            del self._serving[hook]

    async def _serve_nats(self, stream: JetStream) -> None:
        async def step() -> None:
            # First the connection: what can't be sent is neither claimed nor counted as an attempt.
            try:
                await stream.connect()
            except StreamError as error:
                _log.warning("nats_unreachable", error=str(error))
                await asyncio.sleep(RETRY_S)
                return
            await self._drain(outbox.NATS, NATS_BATCH, functools.partial(_publish, stream))

        try:
            await self._repeat("nats", IDLE_S, step)
        finally:
            await stream.close()

    async def _drain(self, target: str, batch: int, send: Callable[[Delivery], Awaitable[Outcome]]) -> None:
        """Deliver what is due for a target until nothing is left, or nothing of a batch went through."""
        while True:
            async with self._database.begin() as connection:
                claimed = await outbox.claim(connection, target, clock.now_us(), batch)
            outcomes = await asyncio.gather(*map(send, claimed))
            if outcomes:
                await self._settle(outcomes)
            if all(outcome.error is not None for outcome in outcomes):
                return

    async def _settle(self, outcomes: Sequence[Outcome]) -> None:
        async with self._database.begin() as connection:
            await outbox.settle(connection, outcomes, clock.now_us())
        for outcome in outcomes:
            delivery = outcome.delivery
            given_up = outcome.gone or delivery.attempt >= outbox.MAX_ATTEMPTS
            ended = "delivered" if outcome.error is None else "given_up" if given_up else "failed"
            self.counts.add(outbox.NATS if delivery.target == outbox.NATS else "hook", ended)
            if outcome.error is not None:
                _log.warning(
                    "delivery_failed",
                    event_id=delivery.event,
                    target=delivery.target,
                    attempt=delivery.attempt,
                    given_up=given_up,
                    error=outcome.error,
                )

    async def _send(self, session: aiohttp.ClientSession, delivery: Delivery) -> Outcome:
        """Post one event to its hook."""
        now_s = clock.now_us() // 1_000_000
        headers = {
            "content-type": "application/json",
            "user-agent": "EdgeWarden",
            "webhook-id": delivery.event,
            "webhook-timestamp": str(now_s),
            "webhook-signature": sign(delivery.secret, delivery.event, now_s, delivery.body),
        }
        try:
            async with session.post(
                delivery.url, data=delivery.body, headers=headers, allow_redirects=False
            ) as response:
                # A short answer is read so that the connection can be used again; a longer one costs its sender the connection.
                await response.content.read(MAX_ANSWER_BYTES)
                status, is_success = response.status, 200 <= response.status < 300  # noqa: PLR2004 -- HTTP's class of success
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # The class alone: the text may hold the address, and an address may hold a token. ValueError: of an answer that is no HTTP.
            return Outcome(delivery, type(error).__name__)
        return Outcome(delivery, None if is_success else f"status {status}", gone=status == _GONE)


async def _publish(stream: JetStream, delivery: Delivery) -> Outcome:
    try:
        await stream.publish(delivery.event, delivery.kind, delivery.body)
    except StreamError as error:
        return Outcome(delivery, str(error))
    return Outcome(delivery)
