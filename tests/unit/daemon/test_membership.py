"""A node and its controller: what an operator may ask for when, what is recorded, and what a failure leaves behind."""

import asyncio
import contextlib
import json
import socket
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from agent.attest.enrolment import JoinToken
from agent.attest.result import AttestationResult
from agent.config import ControlSettings
from agent.control.surface import NodeControl
from agent.daemon import membership as room
from agent.daemon.control import ControlListener
from agent.daemon.membership import Membership
from agent.errors import AuditError, ControllerError, HostError, PeerError, VerificationError
from agent.flows.enrolled import EnrolmentStore
from agent.flows.enrolment import Enrolled, EnrolOrder
from agent.flows.push import Reporter
from agent.records import AuditEvent, Principal
from tests.support.attest import Attester
from tests.support.controller import Ca, pem, private_key
from tests.support.enrolment import identity_of
from tools.software_tpm import free_port

ROOT = Principal(id="uid:0", kind="unix", roles=("admin",))
KEY = ec.generate_private_key(ec.SECP256R1())
NONCE, OTHER = bytes(32), bytes([1]) * 32
URL = "https://controller.example"


def token(url=URL):
    return JoinToken(url=url, spki_sha256="ab" * 32, id="0" * 16, secret=b"not for everybody's eyes").text()


def result(status="affirming", nonce=NONCE):
    fields: dict[str, Any] = {"node": "n1", "issued_at": 1, "vector": {}, "policy_id": "p", "build": "b"}
    return AttestationResult(status=status, nonce=nonce.hex(), **fields).sign(KEY, "k1")


class Node:
    """What a membership needs of a node; its records can fail."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self.refused = ""
        self.collected: list[str | None] = []

    def record(self, event):
        done = asyncio.get_running_loop().create_future()
        if event.kind == self.refused:
            done.set_exception(AuditError("no space left"))
        else:
            self.events.append(event)
            done.set_result(None)
        return done

    def trust_changed(self, *, models):
        pass

    async def collect(self, nonce, _from_index, control_spki_sha256):
        self.collected.append(control_spki_sha256)
        return Attester().evidence(nonce=nonce, node="n1")

    def outcomes(self):
        return [(event.kind, event.outcome) for event in self.events]


class Grants:
    """In the place of the flow that speaks to TPM and controller: grants, refuses, or waits."""

    failure: Exception | None = None
    gate: asyncio.Event | None = None

    def __init__(self, _node, _tpm, store, _evidence):
        self._store = store

    async def run(self, order, mode, address):
        if self.gate:
            await self.gate.wait()
        if self.failure:
            raise self.failure
        identity = identity_of(KEY, url=order.url, mode=mode, address=address)
        self._store.save_key(identity.key)
        self._store.save(identity, result())
        return Enrolled(identity, result(), AttestationResult.verify(result(), identity.keys, "n1"))


class World:
    def __init__(self, folder, settings=None):
        self.store = EnrolmentStore(folder / "controller")
        self.node = Node()
        self.settings = settings
        self.running: list[asyncio.Task[object]] = []
        self.membership = self.made()

    def made(self):
        return Membership("n1", self.store, cast("Any", None), self.settings, cast("Any", self.node))

    def spawn(self, work):
        task = asyncio.ensure_future(work)
        self.running.append(task)
        return task

    @property
    def reporting(self):
        return [task for task in self.running if not task.done()]

    async def enrol(self, **changes):
        return await self.membership.enrol(EnrolOrder(**{"token": token(), **changes}), ROOT)


async def _never(_reporter):
    await asyncio.Event().wait()


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "EnrolmentFlow", Grants)
    monkeypatch.setattr(Grants, "failure", None)
    monkeypatch.setattr(Grants, "gate", None)
    monkeypatch.setattr(Reporter, "run", _never)  # rounds have tests of their own
    world = World(tmp_path)
    await world.membership.restore()
    await world.membership.start(None, world.spawn)
    yield world
    await world.membership.stop()


async def test_a_node_enrols_says_so_and_leaves(world):
    """Each with its record; rounds run meanwhile, and no longer."""
    assert world.membership.status()["enrolled"] is False
    status = await world.enrol()
    assert (status["enrolled"], status["controller"], status["mode"], status["trust"]) == (
        True,
        URL,
        "push",
        "affirming",
    )
    assert len(world.reporting) == 1
    assert world.store.load("n1") is not None
    assert (await world.membership.leave(ROOT))["enrolled"] is False
    assert (world.store.load("n1"), world.reporting, world.membership.trust.tier) == (None, [], "unknown")
    assert world.node.outcomes() == [("node.enrol", "ok"), ("node.leave", "ok")]
    assert {event.detail["controller"] for event in world.node.events} == {URL + ":443"}
    assert (await world.enrol())["enrolled"] is True


async def test_an_enrolment_comes_back_with_the_agent(world):
    """With what was last heard of the controller, and rounds."""
    await world.enrol()
    again = world.made()
    await again.restore()
    await again.start(None, world.spawn)
    assert (again.status()["enrolled"], again.status()["trust"], again.status()["connected"]) == (
        True,
        "affirming",
        False,
    )
    assert len(world.reporting) == 2
    await again.stop()


async def test_an_enrolled_node_enrols_nowhere_else(world):
    """409, before the token is looked at; what there is stays."""
    await world.enrol()
    before = world.store.load("n1")
    for order in (token(), token("https://other.example"), "damaged"):
        with pytest.raises(PeerError, match="leave first") as caught:
            await world.enrol(token=order)
        assert caught.value.status == 409
    assert world.store.load("n1") == before
    assert world.node.outcomes() == [("node.enrol", "ok")]


async def test_a_node_that_is_not_enrolled_has_nothing_to_leave(world):
    """409, and no record of what did not happen."""
    with pytest.raises(PeerError, match="not enrolled") as caught:
        await world.membership.leave(ROOT)
    assert (caught.value.status, world.node.events) == (409, [])


async def test_one_call_at_a_time(world, monkeypatch):
    """While a call enrols the node, another one and a leaving are refused at once, and it comes to its end."""
    gate = asyncio.Event()
    monkeypatch.setattr(Grants, "gate", gate)
    first = asyncio.create_task(world.enrol())
    await asyncio.sleep(0)
    for work in (world.enrol(), world.membership.leave(ROOT)):
        with pytest.raises(PeerError, match="another call") as caught:
            await work
        assert caught.value.status == 409
    gate.set()
    assert (await first)["enrolled"] is True


@pytest.mark.parametrize(
    "failure",
    [
        ControllerError("https://controller.example:443: refused with 403: the join token was used", 403),
        ControllerError("https://controller.example:443: no answer"),
        VerificationError("controller-key", "another key"),
        HostError("the TPM does not answer"),
    ],
)
async def test_a_refused_enrolment_is_recorded_and_leaves_nothing(world, monkeypatch, failure):
    """With its words; the next try is as good as the first."""
    monkeypatch.setattr(Grants, "failure", failure)
    with pytest.raises(type(failure)):
        await world.enrol()
    (event,) = world.node.events
    assert (event.kind, event.outcome, event.error) == ("node.enrol", "failed", str(failure))
    assert (world.store.load("n1"), world.reporting, world.membership.trust.tier) == (None, [], "unknown")
    monkeypatch.setattr(Grants, "failure", None)
    assert (await world.enrol())["enrolled"] is True


@pytest.mark.parametrize("url", ["https://me:hunter2@controller.example", "https://controller.example/?hunter2"])
async def test_an_address_with_a_password_is_refused_and_told_nobody(world, url):
    """Not in a log, a record or the error."""
    with capture_logs() as log, pytest.raises(VerificationError, match="join-token") as caught:
        await world.enrol(token=token(url))
    assert "hunter2" not in json.dumps([log, str(caught.value), repr(world.node.events)])


async def test_an_enrolment_that_can_not_be_recorded_is_forgotten(world):
    """The node is not enrolled, neither now nor after a restart, and enrols once there is room."""
    world.node.refused = "node.enrol"
    with pytest.raises(AuditError):
        await world.enrol()
    assert (world.store.load("n1"), world.reporting) == (None, [])
    assert world.membership.status()["enrolled"] is False
    world.node.refused = ""
    assert (await world.enrol())["enrolled"] is True


async def test_who_can_not_record_that_the_node_left_stays(world):
    """Leaving makes trust unknown, which may be served more: not without a record."""
    await world.enrol()
    world.node.refused = "node.leave"
    with pytest.raises(AuditError):
        await world.membership.leave(ROOT)
    assert world.store.load("n1") is not None
    assert (world.membership.trust.tier, len(world.reporting)) == ("affirming", 1)


async def test_a_leaving_that_fails_leaves_the_node_as_it_was(world, monkeypatch):
    """It goes on to push, the failure is recorded, and asking again does it."""
    await world.enrol()

    def broken(_store):
        raise HostError("read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(EnrolmentStore, "forget", broken)
        with pytest.raises(HostError, match="read-only"):
            await world.membership.leave(ROOT)
    assert world.membership.status()["enrolled"] is True
    assert (world.membership.trust.tier, len(world.reporting)) == ("affirming", 1)
    assert world.node.outcomes()[-2:] == [("node.leave", "ok"), ("node.leave", "failed")]
    assert (await world.membership.leave(ROOT))["enrolled"] is False


async def test_only_evidence_with_the_enrolled_key_can_be_answered_by_a_result(world):
    """Evidence for somebody else, on another listener or before the enrolment, is none that a result may speak of."""
    with pytest.raises(PeerError, match="not enrolled"):
        await world.membership.controller_evidence(NONCE, 0)
    world.membership.answered(NONCE, "ab" * 32)
    await world.enrol()
    identity = world.store.load("n1")
    for spki in (None, "ab" * 32):
        world.membership.answered(NONCE, spki)
    with pytest.raises(VerificationError, match="lately"):
        await world.membership.take_result(result("warning"))
    world.membership.answered(NONCE, identity.spki_sha256)
    await world.membership.take_result(result("warning"))
    await world.membership.controller_evidence(OTHER, 0)
    assert world.node.collected == [identity.spki_sha256]
    await world.membership.take_result(result("affirming", OTHER))
    assert world.membership.trust.tier == "affirming"


# --- with a control listener


@contextlib.asynccontextmanager
async def listening(folder, monkeypatch, listen, address="127.0.0.1"):
    """A node whose configuration says ``listen``; its socket is on the loopback in any case."""
    monkeypatch.setattr(room, "EnrolmentFlow", Grants)
    monkeypatch.setattr(Reporter, "run", _never)
    world = World(folder, ControlSettings(listen=listen))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # A port of the operator's, as in the field: one that the kernel chose would be another one after each pause.
    with socket.create_server((address, free_port()), family=family) as sock:
        listener = ControlListener(sock, cast("NodeControl", None))
        await world.membership.start(listener, world.spawn)
        try:
            yield world, sock.getsockname()[1]
        finally:
            await world.membership.stop()


@pytest.mark.parametrize(
    ("listen", "order", "expected"),
    [
        ("192.0.2.7:8444", {}, ("pull", "127.0.0.1:{port}")),
        ("[2001:db8::7]:8444", {}, ("pull", "[::1]:{port}")),
        ("192.0.2.7:8444", {"address": "edge.example:9"}, ("pull", "edge.example:9")),
        ("192.0.2.7:8444", {"mode": "push"}, ("push", None)),
        ("0.0.0.0:8444", {}, ("push", None)),
        ("[::]:8444", {}, ("push", None)),
        ("127.0.0.1:8444", {}, ("push", None)),
        ("127.0.0.1:8444", {"mode": "pull", "address": "edge.example:9"}, ("pull", "edge.example:9")),
    ],
)
async def test_who_begins_an_appraisal(tmp_path, monkeypatch, listen, order, expected):
    """The controller, where it is known how it reaches the node, which an address for all or for this machine alone does not say."""
    address = "::1" if "2001" in listen else "127.0.0.1"
    async with listening(tmp_path, monkeypatch, listen, address) as (world, port):
        status = await world.enrol(**order)
        wanted = expected[1] and expected[1].format(port=port)
        assert (status["mode"], status["address"]) == (expected[0], wanted)


@pytest.mark.parametrize("listen", [None, "0.0.0.0:8444"])
async def test_pull_needs_a_listener_and_an_address(tmp_path, monkeypatch, world, listen):
    """400, before anybody is spoken to."""
    if listen is None:
        with pytest.raises(PeerError, match="section control") as caught:
            await world.enrol(mode="pull", address="edge.example:9")
    else:
        async with listening(tmp_path / "other", monkeypatch, listen) as (other, _):
            with pytest.raises(PeerError, match="address") as caught:
                await other.enrol(mode="pull")
    assert caught.value.status == 400


async def _shown(port):
    """Return whether somebody greets there; the listener asks for a certificate, so that it is no more than a greeting."""
    import ssl  # noqa: PLC0415 -- a helper of one function

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except OSError:
        return None
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return shown


async def test_a_renewed_certificate_is_served_and_a_node_that_left_listens_no_more(tmp_path, monkeypatch):
    """And it listens again once it is enrolled anew."""
    async with listening(tmp_path, monkeypatch, "192.0.2.7:8444") as (world, port):
        await world.enrol()
        first = await _shown(port)
        identity = world.store.load("n1")
        await world.membership.renewed(identity)
        assert await _shown(port) == first
        await world.membership.leave(ROOT)
        assert await _shown(port) is None
        await world.enrol()
        assert await _shown(port) not in {None, first}


async def test_a_renewed_certificate_is_kept_also_without_a_listener(world):
    """A node that pushes shows it from now on, and after a restart."""
    await world.enrol()
    first = world.store.load("n1")
    key = private_key(first.key).public_key()
    renewed = first.renewed(pem(Ca().issue(key, "spiffe://fleet.example/node/n1", end_s=9e5)).encode())
    before = world.membership.status()["certificate_until"]
    await world.membership.renewed(renewed)
    assert world.store.load("n1") == renewed != first
    assert world.membership.status()["certificate_until"] > before
