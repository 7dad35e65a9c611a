"""Pull: claim who is due, ask each for Evidence, appraise, keep, and leave the result with the node.

Rules:

1. A nonce is 32 bytes from the system's generator, used for one request, and never stored.
2. A poll has one time limit for all of it, and Evidence is read up to a limit; what is longer is cut off and refused.
3. Whatever a node sends, its poll ends in a result or in "not reached"; nothing that it does stops the others. An error of this program's own
   ends the process, as that of any other task.
4. A result is told only after it was kept. A node that does not take it loses nothing: it will be polled again.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

import aiohttp
import structlog

from agent import clock
from agent.attest.enrolment import RESULT_PATH
from agent.attest.evidence import MAX_EVIDENCE_BYTES, NONCE_BYTES
from agent.errors import EdgeWardenError, PeerError
from controller.flows.appraising import Appraiser, Finding
from controller.metrics import LAG_BUCKETS_S, Histogram
from controller.settings import PollSettings
from controller.store import schedule
from controller.store.database import Database, StoreError
from controller.store.fleet import NodeRecord
from controller.trust.authority import Authority
from controller.trust.node_tls import PinnedResponse, poll_context

__all__ = ["Poller", "UnreachableError"]

IDLE_S = 0.5  # until the next look for who is due, where nobody was
BETWEEN_S = 0.05  # until the next look, where somebody was: who comes together is claimed together
STORE_RETRY_S = 2.0
KEEP_ALIVE_S = 5
_READ_BYTES = 256 * 1024
_EVIDENCE_PATH = "/attestation/v1/evidence"
_log = structlog.get_logger(__name__)


class UnreachableError(EdgeWardenError):
    """A node did not answer, or answered something that is no Evidence."""


@dataclass(slots=True)
class PollCounts:
    """What this replica did, for its metrics; times in seconds and microseconds, as the names say."""

    polls: int = 0
    unreachable: int = 0
    lag_s: Histogram = field(default_factory=lambda: Histogram(LAG_BUCKETS_S))


class Poller:
    """One replica's polling. Make it inside the running loop.

    Attributes:
        paused: it waits for the database.
        looked_us: when it last found out who is due (monotonic microseconds); 0: never.
    """

    def __init__(self, database: Database, appraiser: Appraiser, authority: Authority, settings: PollSettings) -> None:
        self._database = database
        self._appraiser = appraiser
        self._settings = settings
        self._limit_bytes = min(settings.max_evidence_bytes, MAX_EVIDENCE_BYTES)
        self._context = poll_context(authority)
        self._session: aiohttp.ClientSession | None = None
        self._running: set[asyncio.Task[None]] = set()
        self.counts = PollCounts()
        self.paused = False
        self.looked_us = 0

    async def run(self) -> None:
        """Poll until cancelled. A database that does not answer is waited for."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        found = await self._claim(group)
                    except StoreError as error:
                        self.paused = True
                        _log.error("polling_paused", error=str(error))
                        await asyncio.sleep(STORE_RETRY_S)
                        continue
                    self.paused = False
                    self.looked_us = clock.monotonic_us()
                    await asyncio.sleep(BETWEEN_S if found else IDLE_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _claim(self, group: asyncio.TaskGroup) -> int:
        room = self._settings.concurrency - len(self._running)
        if room <= 0:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            return 1
        async with self._database.begin() as connection:
            due = await schedule.claim(connection, clock.now_us(), room)
        for one in due:
            self.counts.lag_s.observe(one.lag_us / 1e6)
            task = group.create_task(self._poll_logged(one.node))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return len(due)

    async def _poll_logged(self, node: NodeRecord) -> None:
        try:
            if node.mode == "push":
                await self._note_silence(node, "it has not pushed Evidence within its interval")
            else:
                await self.poll(node)
        except (UnreachableError, StoreError, PeerError) as error:
            _log.warning("poll_failed", node=node.id, error=str(error))

    async def poll(self, node: NodeRecord) -> Finding:
        """Poll one node now.

        Raises:
            UnreachableError: it did not answer; that was noted.
            StoreError: nothing was kept.
            PeerError: 409, another appraisal of this node was faster.
        """
        self.counts.polls += 1
        start = node.verified.index if node.verified else 0
        finding = await self._ask(node, start)
        if start and finding.appraisal.failed is not None and finding.appraisal.failed.name == "log-replay":
            finding = await self._ask(node, 0)  # a new boot's log, or a broken one: the whole log tells which
        if finding.appraisal.retry:  # nobody's fault, and no news: the last result goes on ageing
            async with self._database.begin() as connection:
                await schedule.answered(connection, node.id, clock.now_us())
            return finding
        if not await self._appraiser.keep_same(self._database, finding):
            async with self._database.begin() as connection:
                await schedule.answered(connection, node.id, clock.now_us())
                await self._appraiser.keep(connection, finding)
        await self._tell(node, finding)
        return finding

    async def _ask(self, node: NodeRecord, start: int) -> Finding:
        nonce = secrets.token_bytes(NONCE_BYTES)
        limit_s = min(self._settings.timeout_s, node.interval_s)
        try:
            async with asyncio.timeout(limit_s):
                evidence, spki = await self._fetch(node, nonce, start)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, PeerError) as error:
            words = str(error) or f"no answer within {limit_s} s"
            await self._note_silence(node, words)
            raise UnreachableError(f"{node.id}: {words}") from error
        return await self._appraiser.appraise(self._database.begin, node, evidence, nonce, spki)

    async def _fetch(self, node: NodeRecord, nonce: bytes, start: int) -> tuple[bytes, str]:
        answer = await self._get(node, nonce, start)
        if answer is None and start:
            answer = await self._get(node, nonce, 0)  # its TPM was reset: the log is a new one
        if answer is None:
            raise PeerError(502, "no_evidence", "it refuses to give Evidence from the log's beginning")
        return answer

    async def _get(self, node: NodeRecord, nonce: bytes, start: int) -> tuple[bytes, str] | None:
        """Return Evidence and the peer's key; None when the node says that its log has no such index."""
        params = {"nonce": nonce.hex(), "from": str(start)}
        async with self._client().get(self._url(node, _EVIDENCE_PATH), params=params, allow_redirects=False) as answer:
            if answer.status == 400:  # noqa: PLR2004 -- Bad Request
                return None
            if answer.status != 200:  # noqa: PLR2004 -- OK
                raise PeerError(502, "no_evidence", f"it answers {answer.status} instead of Evidence")
            spki = answer.peer_spki_sha256 if isinstance(answer, PinnedResponse) else ""
            return await self._read(answer), spki

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in answer.content.iter_chunked(_READ_BYTES):
            parts.append(part)
            size += len(part)
            if size > self._limit_bytes:
                answer.close()
                raise PeerError(502, "too_large", f"its Evidence is over {self._limit_bytes} bytes and was cut off")
        return b"".join(parts)

    async def _tell(self, node: NodeRecord, finding: Finding) -> None:
        body = self._appraiser.sign(finding).encode()
        # The poll's last word; a connection that nobody needs for a minute costs both sides its buffers.
        headers = {} if node.interval_s <= KEEP_ALIVE_S else {"Connection": "close"}
        url = self._url(node, RESULT_PATH)
        try:
            async with (
                asyncio.timeout(self._settings.timeout_s),
                self._client().put(url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                if answer.status >= 300:  # noqa: PLR2004 -- not taken
                    _log.info("result_not_taken", node=node.id, status=answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            _log.info("result_not_taken", node=node.id, error=str(error))

    async def _note_silence(self, node: NodeRecord, words: str) -> None:
        self.counts.unreachable += 1
        async with self._database.begin() as connection:
            await self._appraiser.keep_silence(connection, node, words)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                ssl=self._context, limit=self._settings.concurrency, limit_per_host=2, keepalive_timeout=KEEP_ALIVE_S
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                response_class=PinnedResponse,
                auto_decompress=False,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
            )
        return self._session

    @staticmethod
    def _url(node: NodeRecord, path: str) -> str:
        if not node.address:
            raise PeerError(502, "no_address", "no address is known: it was enrolled to push")
        return f"https://{node.address}{path}"
