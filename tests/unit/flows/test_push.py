"""Rounds of pushed Evidence, over real TLS, against a controller that is slow, broken, hostile or gone."""

import asyncio
import contextlib
import datetime as dt
import json
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent import clock
from agent.attest.enrolment import CHALLENGE_PATH, EVIDENCE_PATH, EnrolRequest, PushAnswer, PushedEvidence, read_message
from agent.errors import HostError, PeerError
from agent.flows import controller as door
from agent.flows.enrolled import EnrolmentStore
from agent.flows.push import FIRST_BACKOFF_S, JITTER, LOOK_S, MAX_BACKOFF_S, Reporter, backoff_s
from agent.flows.trust import TrustKeeper
from tests.support.attest import Attester
from tests.support.controller import MAX_REQUEST_BYTES, FakeController, Member, pem
from tests.support.enrolment import identity_of

INTERVAL_S = 7
STRANGER = ec.generate_private_key(ec.SECP256R1())


class EnoughError(Exception):
    """Ends a reporter, which would go on for ever."""


class World:
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


@pytest.fixture
def controller():
    with FakeController() as running:
        yield running


@pytest.fixture
def world(controller, tmp_path):
    return World(controller, tmp_path / "controller")


def honest(*, shown=True, asked=False):
    return [(CHALLENGE_PATH, shown, False), (EVIDENCE_PATH, shown, asked)]


async def test_a_round_brings_a_result_and_the_next_comes_no_earlier_than_the_interval(world):
    """Whatever the jitter; the first round of a start comes soon, and a fleet's do not come at once."""
    world.controller.status = "warning"
    first, *later = await world.rounds(20)
    assert world.trust.tier == "warning"
    assert world.calls() == honest() * 20
    assert first <= FIRST_BACKOFF_S * (1 + JITTER)
    assert all(INTERVAL_S <= delay <= INTERVAL_S * (1 + JITTER) for delay in later)
    assert len(set(later)) > 1


async def test_the_interval_is_the_one_of_the_last_answer(world):
    """A controller under load slows its fleet down."""
    world.controller.interval_s = 3600
    assert (await world.rounds())[1] >= 3600


async def _text(text, status=200, **headers):
    return web.Response(text=text, status=status, headers=headers)


async def _slow(_request):
    await asyncio.sleep(30)
    return web.Response()


async def _cut(request):
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"result":')
    request.transport.abort()
    return response


async def _rude(request):
    request.transport.write(b"\0\0\0 no HTTP\r\n\r\n")
    request.transport.close()
    return web.Response()


BROKEN = {
    "silence": (_slow, "no answer"),
    "500": (lambda _: _text("<html>", 500), "refused with 500: no reason given"),
    "503 with words": (lambda _: _text('{"error":"come later"}', 503), "503: come later"),
    "a redirect": (lambda _: _text("", 307, Location="https://127.0.0.1:1/"), "refused with 307"),
    "too much": (lambda _: _text(" " * (1 << 20)), "an answer of over"),
    "too much of a refusal": (lambda _: _text(" " * 5000, 403), "an answer of over"),
    "a refusal that nests without end": (lambda _: _text('{"x":' + "[" * 4000, 403), "403: no reason given"),
    "garbage": (lambda _: _text("\0{"), "encoding"),
    "the end of the connection in the middle": (_cut, "no answer"),
    "no HTTP": (_rude, "no answer"),
}


@pytest.mark.parametrize("path", [CHALLENGE_PATH, EVIDENCE_PATH])
@pytest.mark.parametrize("how", BROKEN)
async def test_a_broken_answer_costs_a_round(world, monkeypatch, how, path):
    """It is named, trust stays what it was, and the next round is as good as any."""
    monkeypatch.setattr(door, "CALL_TIMEOUT_S", 0.2 if how == "silence" else 60)
    handler, words = BROKEN[how]
    before = world.trust.facts().trust
    world.controller.answers = {path: handler}
    _, delay = await world.rounds()
    assert words in world.reporter.failure
    assert FIRST_BACKOFF_S * (1 - JITTER) <= delay <= FIRST_BACKOFF_S * (1 + JITTER)
    assert world.trust.facts().trust == before
    world.controller.answers = {}
    monkeypatch.setattr(door, "CALL_TIMEOUT_S", 60)
    world.controller.status = "warning"
    assert (await world.rounds())[1] >= INTERVAL_S
    assert (world.reporter.failure, world.trust.tier) == ("", "warning")


def _answer(result, interval_s=INTERVAL_S):
    return json.dumps({"result": result, "interval_s": interval_s})


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "for another node": ({"node": "n2"}, "another node"),
    "by another key": ({"key": STRANGER}, "not an Attestation Result"),
    "over a nonce that was never quoted": ({"nonce": "ab" * 32}, "nonce"),
    "older than the last": ({"issued_at": 1_000_000_000}, "older than the last"),
    "of a time that has no text": ({"issued_at": 10**12}, "not an Attestation Result"),
}


@pytest.mark.parametrize("how", LIES)
async def test_a_result_that_does_not_count_changes_nothing(world, how):
    """A better result that is not the controller's own fresh word about this node leaves trust where it was."""
    world.controller.status = "contraindicated"
    await world.rounds()
    assert world.trust.tier == "contraindicated"
    changes, words = LIES[how]

    async def lie(request):
        nonce = read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce
        fields = {"status": "affirming", "nonce": nonce, **changes}
        return await _text(_answer(world.controller.result(fields.pop("nonce"), **fields)))

    world.controller.answers = {EVIDENCE_PATH: lie}
    await world.rounds()
    assert words in world.reporter.failure
    assert world.trust.tier == "contraindicated"
    assert '"contraindicated"' in _payload(world.store.result())


def _payload(jwt):
    import base64  # noqa: PLC0415 -- a helper of one function

    body = jwt.split(".")[1]
    return base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)).decode()


async def test_a_result_that_is_cut_anywhere_is_none(world):
    """Every length but the whole one is refused, by name."""
    for part in (0, 1, 20, 100, -1):

        async def cut(request, part=part):
            nonce = read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce
            return await _text(_answer(world.controller.result(nonce, status="warning")[:part]))

        world.controller.answers = {EVIDENCE_PATH: cut}
        await world.rounds()
        assert "result" in world.reporter.failure
        assert world.trust.tier == "affirming"


@pytest.mark.parametrize("interval_s", [0, -1, 86_401, None, "7"])
async def test_an_interval_out_of_bounds_is_no_answer(world, interval_s):
    """Nobody makes a node push without a pause, or never again."""

    async def answer(request):
        nonce = read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce
        return await _text(_answer(world.controller.result(nonce), interval_s))

    world.controller.answers = {EVIDENCE_PATH: answer}
    _, delay = await world.rounds()
    assert "encoding" in world.reporter.failure
    assert delay >= FIRST_BACKOFF_S * (1 - JITTER)


async def test_a_controller_that_is_gone_is_asked_ever_more_seldom_and_found_again(world):
    """One attempt a waiting time, which grows to its bound; the first round that works resets it."""
    world.controller.stop()
    _, *delays = await world.rounds(12)
    for number, delay in enumerate(delays):
        nominal = min(FIRST_BACKOFF_S * 2**number, MAX_BACKOFF_S / (1 + JITTER))
        assert nominal * (1 - JITTER) <= delay <= min(nominal * (1 + JITTER), MAX_BACKOFF_S)
    assert "localhost" in world.reporter.failure
    world.controller.start()
    await world.rounds(1)
    assert world.reporter.failure == ""
    world.controller.stop()
    assert (await world.rounds(1))[1] <= FIRST_BACKOFF_S * (1 + JITTER)


def test_the_waiting_time_is_bounded_after_any_number_of_failures():
    """A node that was offline for weeks asks at least every five minutes."""
    for failures in (1, 2, 10, 100, 10**6):
        assert FIRST_BACKOFF_S * (1 - JITTER) <= backoff_s(failures) <= MAX_BACKOFF_S


async def test_connected_ends_after_two_and_a_half_intervals_and_comes_back(world, monkeypatch):
    """Failing rounds do not count as a word of the controller's; one that succeeds does."""
    now_us = clock.monotonic_us()
    monkeypatch.setattr("agent.clock.monotonic_us", lambda: now_us)
    await world.rounds()
    world.controller.answers = {"/": lambda _: _text("", 503)}
    for step in range(4):
        now_us += 1_000_000 * INTERVAL_S
        await world.rounds()
        assert world.trust.connected()[0] is (step < 2)
    world.controller.answers = {}
    await world.rounds()
    assert world.trust.connected()[0] is True


# --- the certificate


async def test_the_certificate_is_renewed_at_half_of_its_life_and_not_before(world, monkeypatch):
    """Once; the next connection shows the new one, which is kept."""
    now = world.identity.renew_at - 1
    monkeypatch.setattr("agent.clock.now", lambda: now)
    await world.rounds()
    assert world.calls() == honest()
    now += 1
    await world.rounds(3)
    assert world.calls() == [*honest(asked=True), *honest() * 2]
    (renewed,) = world.renewals
    assert (world.kept, world.kept.spki_sha256) == (renewed, world.identity.spki_sha256)
    assert renewed.certificate != world.identity.certificate


async def test_a_renewed_certificate_that_can_not_be_kept_is_asked_for_again(world, monkeypatch):
    """The node does not go on with a certificate that a restart or its own listener does not have."""
    now = world.identity.renew_at
    monkeypatch.setattr("agent.clock.now", lambda: now)
    world.full = True
    await world.rounds(2)
    assert "no space left" in world.reporter.failure
    assert world.kept == world.identity
    world.full = False
    world.calls()
    await world.rounds(2)
    assert world.calls() == [*honest(asked=True), *honest()]
    assert len(world.renewals) == 1


async def test_a_controller_that_renews_nothing_is_asked_each_interval(world, monkeypatch):
    """And no oftener."""
    now = world.identity.renew_at
    monkeypatch.setattr("agent.clock.now", lambda: now)

    async def without(request):
        nonce = read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce
        return await _text(_answer(world.controller.result(nonce)))

    world.controller.answers = {EVIDENCE_PATH: without}
    _, *delays = await world.rounds(3)
    assert world.calls() == honest(asked=True) * 3
    assert min(delays) >= INTERVAL_S
    assert world.renewals == []


@pytest.mark.parametrize("how", ["of another key", "for another node", "none"])
async def test_a_certificate_that_is_not_the_nodes_is_not_taken(world, monkeypatch, how):
    """The old one stays, and is shown again."""
    now = world.identity.renew_at
    monkeypatch.setattr("agent.clock.now", lambda: now)
    ca, own = world.controller.ca, x509.load_der_x509_csr(world.identity.csr()).public_key()
    assert isinstance(own, ec.EllipticCurvePublicKey)
    certificate = {
        "of another key": pem(ca.issue(STRANGER.public_key(), "spiffe://fleet.example/node/n1")),
        "for another node": pem(ca.issue(own, "spiffe://fleet.example/node/n2")),
        "none": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    }[how]

    async def renew(request):
        nonce = read_message(await request.read(), PushedEvidence, MAX_REQUEST_BYTES).nonce
        result = world.controller.result(nonce)
        return web.Response(body=PushAnswer(result=result, interval_s=7, certificate=certificate).encode())

    world.controller.answers = {EVIDENCE_PATH: renew}
    await world.rounds()
    assert "enrolment" in world.reporter.failure
    assert (world.kept, world.renewals) == (world.identity, [])
    world.controller.answers = {}
    world.calls()
    await world.rounds()
    assert world.calls() == honest(asked=True)


async def test_a_certificate_that_has_ended_is_not_shown_and_comes_back(controller, tmp_path):
    """The attestation key in the quote is enough; from then on the new one is shown."""
    world = World(controller, tmp_path / "controller", begin_s=-7200, end_s=-3600)
    await world.rounds(2)
    assert world.calls() == [*honest(shown=False, asked=True), *honest()]
    assert world.kept.valid_until > clock.now()


async def test_a_connection_that_breaks_is_made_without_the_certificate_next(world):
    """A controller that does not like it any more would break every one; a refusal with a status is no such case."""
    world.controller.answers = {CHALLENGE_PATH: _rude}
    await world.rounds()
    world.controller.answers = {}
    world.calls()
    await world.rounds(2)
    assert world.calls() == [*honest(shown=False, asked=True), *honest()]
    world.controller.answers = {CHALLENGE_PATH: lambda _: _text("", 403)}
    await world.rounds()
    world.controller.answers = {}
    world.calls()
    await world.rounds()
    assert world.calls() == honest()


async def test_a_polled_node_speaks_only_to_renew(controller, tmp_path, monkeypatch):
    """It looks at the clock, and makes its round once half of the certificate's life is over."""
    world = World(controller, tmp_path / "controller", mode="pull")
    now = world.identity.renew_at - 1
    monkeypatch.setattr("agent.clock.now", lambda: now)
    delays = await world.rounds(5)
    assert (world.calls(), delays[1:]) == ([], [LOOK_S] * 5)
    now += 1
    await world.rounds()
    assert world.calls() == honest(asked=True)


async def test_a_controller_of_a_ca_that_has_ended_is_named(controller, tmp_path, monkeypatch):
    """No connection can work any more; the node goes on, not connected, and says how to get out of it."""
    world = World(controller, tmp_path / "controller")
    after = world.identity.ca_until + dt.timedelta(days=1).total_seconds()
    assert "the CA" not in TrustKeeper(world.store, world).connected()[1]
    monkeypatch.setattr("agent.clock.now", lambda: after)
    world.trust.begin(world.identity, world.store.result())
    holds, why = world.trust.connected()
    assert (holds, "leave, and enrol again" in why) == (False, True)
    world.trust.begin(world.identity, world.store.result(), fresh=True)
    assert world.trust.connected()[0] is True


# --- the log


async def test_a_log_that_is_shorter_than_the_controller_thinks_is_sent_from_its_beginning(world):
    """After a reboot; what the controller makes of it is its decision."""
    world.refusals = [PeerError(400, "bad_from", "the log is shorter")]
    await world.rounds()
    assert (world.indices, world.reporter.failure) == ([0, 0], "")


async def test_evidence_that_can_not_be_made_costs_a_round(world):
    """The controller hears nothing but the challenge's call."""
    world.refusals = [PeerError(503, "no_tpm", "the TPM does not answer")]
    await world.rounds()
    assert world.reporter.failure == "the TPM does not answer"
    assert [path for path, _, _ in world.calls()] == [CHALLENGE_PATH]


async def test_a_reporter_that_is_cancelled_hangs_up(world):
    """Nothing of it is left open."""
    world.controller.answers = {CHALLENGE_PATH: _slow}
    heard = asyncio.Event()

    async def once(_seconds):
        heard.set()

    task = asyncio.create_task(Reporter(world.identity, world, wait=once).run())
    await heard.wait()
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
