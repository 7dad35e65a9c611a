"""The certificate of a node that pushes, or is polled: renewed in time, after its time, and never for another one."""

import datetime as dt

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent import clock
from agent.attest.enrolment import CHALLENGE_PATH, EVIDENCE_PATH, PushAnswer
from agent.flows.push import LOOK_S
from agent.flows.trust import TrustKeeper
from tests.support.controller import FakeController, pem
from tests.support.pushing import INTERVAL_S, PushingNode, answer, honest, nonce_of, rude, text

STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def controller():
    with FakeController() as running:
        yield running


@pytest.fixture
def world(controller, tmp_path):
    return PushingNode(controller, tmp_path / "controller")


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
        nonce = await nonce_of(request)
        return await text(answer(world.controller.result(nonce)))

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
        nonce = await nonce_of(request)
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
    world = PushingNode(controller, tmp_path / "controller", begin_s=-7200, end_s=-3600)
    await world.rounds(2)
    assert world.calls() == [*honest(shown=False, asked=True), *honest()]
    assert world.kept.valid_until > clock.now()


async def test_a_connection_that_breaks_is_made_without_the_certificate_next(world):
    """A controller that does not like it any more would break every one; a refusal with a status is no such case."""
    world.controller.answers = {CHALLENGE_PATH: rude}
    await world.rounds()
    world.controller.answers = {}
    world.calls()
    await world.rounds(2)
    assert world.calls() == [*honest(shown=False, asked=True), *honest()]
    world.controller.answers = {CHALLENGE_PATH: lambda _: text("", 403)}
    await world.rounds()
    world.controller.answers = {}
    world.calls()
    await world.rounds()
    assert world.calls() == honest()


async def test_a_polled_node_speaks_only_to_renew(controller, tmp_path, monkeypatch):
    """It looks at the clock, and makes its round once half of the certificate's life is over."""
    world = PushingNode(controller, tmp_path / "controller", mode="pull")
    now = world.identity.renew_at - 1
    monkeypatch.setattr("agent.clock.now", lambda: now)
    delays = await world.rounds(5)
    assert (world.calls(), delays[1:]) == ([], [LOOK_S] * 5)
    now += 1
    await world.rounds()
    assert world.calls() == honest(asked=True)


async def test_a_controller_of_a_ca_that_has_ended_is_named(controller, tmp_path, monkeypatch):
    """No connection can work any more; the node goes on, not connected, and says how to get out of it."""
    world = PushingNode(controller, tmp_path / "controller")
    after = world.identity.ca_until + dt.timedelta(days=1).total_seconds()
    assert "the CA" not in TrustKeeper(world.store, world).connected()[1]
    monkeypatch.setattr("agent.clock.now", lambda: after)
    world.trust.begin(world.identity, world.store.result())
    holds, why = world.trust.connected()
    assert (holds, "leave, and enrol again" in why) == (False, True)
    world.trust.begin(world.identity, world.store.result(), fresh=True)
    assert world.trust.connected()[0] is True
