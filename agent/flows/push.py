"""Evidence that the node carries to its controller, and the renewal of its certificate.

Rules:

1. A round is a challenge, Evidence over its nonce, and the answer: an Attestation Result. A node in mode push makes one each interval and,
   after one that succeeded, never earlier; in either mode one is made when half of the certificate's life is over, with a certificate request for the same key.
2. A round that failed is made again after a growing time, at most :data:`MAX_BACKOFF_S`, for ever: a node that lost its network for weeks comes
   back by itself. Times have jitter, so that a fleet does not come at once.
3. The node's certificate is shown while it is valid. Where it has ended, or a connection broke before there was an answer, the next round is
   made without it and asks for a new one: what identifies the node is the attestation key in the quote.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import structlog

from agent import clock
from agent.attest.enrolment import (
    CHALLENGE_PATH,
    EVIDENCE_PATH,
    Challenge,
    ChallengeRequest,
    PushAnswer,
    PushedEvidence,
)
from agent.attest.evidence import Evidence
from agent.attest.result import MAX_RESULT_BYTES
from agent.errors import ControllerError, HostError, PeerError, VerificationError
from agent.flows.controller import ControllerLink, ca_context, open_link
from agent.flows.enrolled import Identity

__all__ = ["FIRST_BACKOFF_S", "MAX_BACKOFF_S", "PushHooks", "Reporter", "backoff_s"]

FIRST_BACKOFF_S: Final = 2.0
MAX_BACKOFF_S: Final = 300.0
LOOK_S: Final = 30.0  # at the clock, while nothing is due
JITTER: Final = 0.1
MAX_CHALLENGE_BYTES: Final = 4096
MAX_ANSWER_BYTES: Final = MAX_RESULT_BYTES + 128 * 1024
_random = secrets.SystemRandom()
_log = structlog.get_logger(__name__)


class PushHooks(Protocol):
    """What a round needs of the node."""

    async def controller_evidence(self, nonce: bytes, from_index: int) -> Evidence:
        """Return Evidence with the control key's digest; remembers the nonce."""

    async def take_result(self, jwt: str) -> None:
        """Take an Attestation Result."""

    async def renewed(self, identity: Identity) -> None:
        """Keep and use a renewed certificate."""


class Reporter:
    """Makes rounds for as long as it runs.

    Args:
        identity: of the enrolled node.
        hooks: see :class:`PushHooks`.
        wait: sleeps for seconds.
    """

    def __init__(
        self, identity: Identity, hooks: PushHooks, *, wait: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        self._identity = identity
        self._hooks = hooks
        self._wait = wait
        self._interval_s: float = identity.enrolment.interval_s
        self._failures = 0
        self._bare = False  # the next connection shows no certificate
        self._link: ControllerLink | None = None
        self._connection = contextlib.AsyncExitStack()
        self.failure = ""
        """Why the last round failed; empty where it did not."""

    @property
    def renewal_due(self) -> bool:
        """Whether half of the certificate's life is over."""
        return clock.now() >= self._identity.renew_at

    async def run(self) -> None:
        """Make rounds until cancelled."""
        try:
            delay_s = _jittered(min(FIRST_BACKOFF_S, self._interval_s))
            while True:
                await self._wait(delay_s)
                while self._identity.enrolment.mode == "pull" and not self.renewal_due:
                    await self._wait(LOOK_S)
                delay_s = await self._attempt()
        finally:
            await self._hang_up()

    async def _attempt(self) -> float:
        """Make a round and return the time until the next, in seconds."""
        try:
            await self._round()
        except (ControllerError, VerificationError, HostError, PeerError) as error:
            await self._hang_up()
            if isinstance(error, ControllerError) and error.status is None:
                self._bare = not self._bare
            self._failures += 1
            self.failure = str(error)
            delay_s = backoff_s(self._failures)
            _log.warning("push_failed", error=self.failure, failures=self._failures, again_in_s=int(delay_s))
            return delay_s
        if self._failures:
            _log.info("push_works_again", failures=self._failures)
        self._failures, self.failure = 0, ""
        return self._interval_s * _random.uniform(1, 1 + JITTER)

    async def _round(self) -> None:
        link = await self._call()
        identity = self._identity
        node, renew = identity.enrolment.node, self._bare or self.renewal_due
        challenge = await link.post(
            CHALLENGE_PATH, ChallengeRequest(node=node).encode(), Challenge, MAX_CHALLENGE_BYTES
        )
        evidence = await self._evidence(bytes.fromhex(challenge.nonce), challenge.start)
        pushed = PushedEvidence(
            node=node, nonce=challenge.nonce, evidence=evidence, csr=identity.csr() if renew else None
        )
        answer = await link.post(EVIDENCE_PATH, pushed.encode(), PushAnswer, MAX_ANSWER_BYTES)
        self._interval_s = answer.interval_s
        await self._hooks.take_result(answer.result)
        if renew and answer.certificate is not None:
            renewed = identity.renewed(answer.certificate.encode())
            await self._hooks.renewed(renewed)  # where it can't be kept, the next round asks again
            self._identity = renewed
            self._bare = False
            await self._hang_up()  # the next connection shows the new one

    async def _evidence(self, nonce: bytes, start: int) -> Evidence:
        try:
            return await self._hooks.controller_evidence(nonce, start)
        except PeerError as error:
            if error.reason != "bad_from":
                raise
            # The log is that of another boot, and shorter; what the controller makes of it is its decision.
            return await self._hooks.controller_evidence(nonce, 0)

    async def _call(self) -> ControllerLink:
        if self._link is None:
            identity = self._identity
            shown = () if self._bare or clock.now() >= identity.valid_until else (identity.certificate, identity.key)
            context = ca_context(identity.ca, *shown)
            self._link = await self._connection.enter_async_context(open_link(identity.enrolment.url, context))
        return self._link

    async def _hang_up(self) -> None:
        self._link = None
        await self._connection.aclose()


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row, in seconds, with jitter."""
    return _jittered(min(FIRST_BACKOFF_S * 2 ** min(failures - 1, 16), MAX_BACKOFF_S / (1 + JITTER)))


def _jittered(seconds: float) -> float:
    return seconds * _random.uniform(1 - JITTER, 1 + JITTER)
