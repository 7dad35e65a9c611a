"""A node that pushes, without a TPM: it really quotes, keeps and judges, and its rounds are made one by one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from agent.attest.enrolment import CHALLENGE_PATH, EVIDENCE_PATH, EnrolRequest, PushedEvidence, read_message
from agent.errors import HostError, PeerError
from agent.flows.enrolled import EnrolmentStore
from agent.flows.push import Reporter
from agent.flows.trust import TrustKeeper
from tests.support.attest import Attester
from tests.support.controller import MAX_REQUEST_BYTES, Member
from tests.support.enrolment import identity_of

__all__ = ["INTERVAL_S", "PushingNode", "answer", "honest", "nonce_of", "rude", "text"]

INTERVAL_S = 7


class EnoughError(Exception):
    """Ends a reporter, which would go on for ever."""


class PushingNode:
    """A node's half that really quotes, keeps and judges, beside a controller that really appraises."""

    def __init__(self, controller, folder, **changes):
        self.controller = controller
        controller.interval_s = INTERVAL_S
        self.attester = Attester()
        # Half of its life is over about now: a clock that a test moves by seconds goes with the one that TLS looks at.
        life = {"begin_s": -40_000, "end_s": 40_060, **changes}
        self.identity = identity_of(controller.signing_key, controller.ca, url=controller.url, **life)
        controller.member = Member(self._request(), b"", "", self.identity.spki_sha256)
        self.store = EnrolmentStore(folder)
        self.store.save_key(self.identity.key)
        self.store.save(self.identity, self.result())
        self.trust = TrustKeeper(self.store, self)
        self.trust.begin(self.identity, self.result(), fresh=True)
        self.indices: list[int] = []
        self.refusals: list[PeerError] = []
        self.renewals: list[Any] = []
        self.full = False
        self.reporter = Reporter(self.identity, self, wait=self._wait)
        self._delays: list[float] = []
        self._rounds = 0

    def _request(self):
        return EnrolRequest(
            token="0" * 16, secret=bytes(32), node="n1", mode="push", ek_public=b"x", ak_public=self.attester.ak_public
        )

    def result(self, **changes):
        return self.controller.result("00" * 32, **changes)

    # --- hooks

    def record(self, _event):
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def trust_changed(self, *, models):
        pass

    async def controller_evidence(self, nonce, from_index):
        self.indices.append(from_index)
        if self.refusals:
            raise self.refusals.pop(0)
        self.trust.quoted(nonce)
        return self.attester.evidence(nonce=nonce, node="n1", control_spki_sha256=self.identity.spki_sha256)

    async def take_result(self, jwt):
        await self.trust.take(jwt)

    async def renewed(self, identity):
        if self.full:
            raise HostError("no space left")
        self.store.save_certificate(identity.certificate)
        self.renewals.append(identity)

    # --- rounds

    async def _wait(self, seconds):
        self._delays.append(seconds)
        if len(self._delays) > self._rounds:
            raise EnoughError

    async def rounds(self, count=1):
        """Make rounds; returns the waiting times before the first and after each."""
        self._delays, self._rounds = [], count
        with pytest.raises(EnoughError):
            await self.reporter.run()
        return self._delays

    def calls(self):
        """Return path, whether a certificate was shown, and whether one was asked for, of each call so far; forgets them."""
        heard, self.controller.received = self.controller.received, []
        found = []
        for path, body, shown in heard:
            asked = path == EVIDENCE_PATH and read_message(body, PushedEvidence, MAX_REQUEST_BYTES).csr is not None
            found.append((path, shown, asked))
        return found

    @property
    def kept(self):
        return self.store.load("n1")


def honest(*, shown=True, asked=False):
    """Return what :meth:`PushingNode.calls` says of a round that a controller answered."""
    return [(CHALLENGE_PATH, shown, False), (EVIDENCE_PATH, shown, asked)]


async def text(words, status=200, **headers):
    """Answer with these words."""
    return web.Response(text=words, status=status, headers=headers)


async def nonce_of(request):
    """Return the nonce of pushed Evidence."""
    return read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce


def answer(result, interval_s=INTERVAL_S):
    """Return an answer to pushed Evidence that brings no certificate."""
    return json.dumps({"result": result, "interval_s": interval_s})


async def rude(request):
    """Answer with what is no HTTP, and end the connection."""
    request.transport.write(b"\0\0\0 no HTTP\r\n\r\n")
    request.transport.close()
    return web.Response()
