"""Rounds of pushed Evidence, over real TLS, against a controller that is slow, broken, hostile or gone."""

import asyncio
import threading
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from agent import clock
from agent.attest.enrolment import CHALLENGE_PATH, EVIDENCE_PATH
from agent.errors import PeerError
from agent.flows import controller as door
from agent.flows.push import FIRST_BACKOFF_S, JITTER, MAX_BACKOFF_S, Reporter, backoff_s
from tests.support.controller import FakeController
from tests.support.pushing import INTERVAL_S, PushingNode, answer, honest, nonce_of, rude, text

STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def controller():
    with FakeController() as running:
        yield running


@pytest.fixture
def world(controller, tmp_path):
    return PushingNode(controller, tmp_path / "controller")


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


async def _slow(request):
    while request.transport is not None:  # noqa: ASYNC110 -- the node hangs up on another thread
        await asyncio.sleep(0.01)
    return web.Response()


async def _cut(request):
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"result":')
    request.transport.abort()
    return response


BROKEN = {
    "silence": (_slow, "no answer"),
    "500": (lambda _: text("<html>", 500), "refused with 500: no reason given"),
    "503 with words": (lambda _: text('{"error":"come later"}', 503), "503: come later"),
    "a redirect": (lambda _: text("", 307, Location="https://127.0.0.1:1/"), "refused with 307"),
    "too much": (lambda _: text(" " * (1 << 20)), "an answer of over"),
    "too much of a refusal": (lambda _: text(" " * 5000, 403), "an answer of over"),
    "a refusal that nests without end": (lambda _: text('{"x":' + "[" * 4000, 403), "403: no reason given"),
    "garbage": (lambda _: text("\0{"), "encoding"),
    "the end of the connection in the middle": (_cut, "no answer"),
    "no HTTP": (rude, "no answer"),
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
        nonce = await nonce_of(request)
        fields = {"status": "affirming", "nonce": nonce, **changes}
        return await text(answer(world.controller.result(fields.pop("nonce"), **fields)))

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
            nonce = await nonce_of(request)
            return await text(answer(world.controller.result(nonce, status="warning")[:part]))

        world.controller.answers = {EVIDENCE_PATH: cut}
        await world.rounds()
        assert "result" in world.reporter.failure
        assert world.trust.tier == "affirming"


@pytest.mark.parametrize("interval_s", [0, -1, 86_401, None, "7"])
async def test_an_interval_out_of_bounds_is_no_answer(world, interval_s):
    """Nobody makes a node push without a pause, or never again."""

    async def answers(request):
        nonce = await nonce_of(request)
        return await text(answer(world.controller.result(nonce), interval_s))

    world.controller.answers = {EVIDENCE_PATH: answers}
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
    world.controller.answers = {"/": lambda _: text("", 503)}
    for step in range(4):
        now_us += 1_000_000 * INTERVAL_S
        await world.rounds()
        assert world.trust.connected()[0] is (step < 2)
    world.controller.answers = {}
    await world.rounds()
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
    """In the middle of a call: it ends at once, and the controller sees the connection end."""
    cut = threading.Event()

    async def waiting(request):
        answer = await _slow(request)
        cut.set()
        return answer

    async def once(_seconds):
        pass

    world.controller.answers = {CHALLENGE_PATH: waiting}
    task = asyncio.create_task(Reporter(world.identity, world, wait=once).run())
    while not world.controller.received:  # noqa: ASYNC110 -- it is heard on another thread
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cut.wait(10)
    assert world.trust.tier == "affirming"
