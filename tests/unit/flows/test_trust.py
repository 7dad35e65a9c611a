"""Attestation Results at the node: which count, what they do at once, and what a restart remembers."""

import asyncio
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.result import AttestationResult, CheckResult
from agent.errors import AuditError, HostError, VerificationError
from agent.flows.enrolled import EnrolmentStore
from agent.flows.trust import AGE_STEP_S, FUTURE_S, MAX_NONCES, TrustKeeper
from agent.records import AuditEvent
from tests.support.enrolment import identity_of

NONCE, OTHER = bytes(32), bytes([1]) * 32
NOW = 1_900_000_000
DIGEST = "ab" * 32


class Hooks:
    """Remembers what it was told; fails as it is told."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []
        self.changes: list[bool] = []
        self.failure: AuditError | None = None

    def record(self, event: AuditEvent) -> asyncio.Future[None]:
        self.events.append(event)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.failure:
            done.set_exception(self.failure)
        else:
            done.set_result(None)
        return done

    def trust_changed(self, *, models: bool) -> None:
        self.changes.append(models)


class World:
    """An enrolled node's trust, its controller's key and a clock that can be set."""

    def __init__(self, folder):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.identity = replace(
            identity_of(self.key), ca_until=NOW + 10**7
        )  # made today, and the clock is set to another day
        self.store = EnrolmentStore(folder)
        self.hooks = Hooks()
        self.trust = TrustKeeper(self.store, self.hooks)
        self.now = NOW
        self.monotonic_us = 0

    def jwt(self, status="affirming", *, nonce=NONCE, key=None, **changes):
        fields = {"node": "n1", "issued_at": self.now, "vector": {}, "policy_id": "p", "build": "b", "interval_s": 60}
        result = AttestationResult(status=status, nonce=nonce.hex(), **{**fields, **changes})
        return result.sign(key or self.key, "k1")

    async def take(self, status="affirming", **changes):
        self.trust.quoted(changes.get("nonce", NONCE))
        return await self.trust.take(self.jwt(status, **changes))

    def restarted(self):
        again = TrustKeeper(self.store, self.hooks)
        again.begin(self.identity, self.store.result())
        return again


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path / "controller")
    monkeypatch.setattr("agent.clock.now", lambda: float(world.now))
    monkeypatch.setattr("agent.clock.monotonic_us", lambda: world.monotonic_us)
    world.trust.begin(world.identity, world.jwt(), fresh=True)
    return world


def test_trust_is_unknown_only_while_the_node_is_not_enrolled(world):
    """Before and after an enrolment trust is unknown and nothing is barred."""
    fresh = TrustKeeper(world.store, world.hooks)
    assert (fresh.tier, fresh.facts().attested_age_s, fresh.bars([DIGEST])) == ("unknown", None, "")
    world.trust.end()
    assert (world.trust.tier, world.trust.facts().attested_age_s, world.trust.bars([DIGEST])) == ("unknown", None, "")
    assert world.trust.connected() == (False, "no controller is configured")


async def test_a_result_for_a_quoted_nonce_takes_effect(world):
    """It is kept, recorded where it changes something, and told."""
    await world.take("warning", checks=(CheckResult("refused", "warning", "m/1"),))
    assert world.trust.tier == "warning"
    assert [(event.kind, event.detail["before"], event.detail["now"]) for event in world.hooks.events] == [
        ("node.trust", "affirming", "warning")
    ]
    assert world.trust.status()["checks"] == [{"name": "refused", "outcome": "warning", "words": "m/1"}]
    assert world.restarted().tier == "warning"


async def test_a_result_that_changes_nothing_is_not_recorded(world):
    """One record a change, not one a result."""
    await world.take("affirming")
    assert world.hooks.events == []
    assert world.hooks.changes[-1] is False


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nonce": OTHER}, "nonce"),
        ({"node": "n2"}, "another node"),
        ({"key": ec.generate_private_key(ec.SECP256R1())}, "signature"),
        ({"issued_at": NOW - 1}, "older"),
    ],
)
async def test_a_result_that_does_not_count_changes_nothing(world, changes, why):
    """Never quoted, another node's, signed by another key, older than the last: refused, and trust is what it was."""
    world.trust.quoted(NONCE)
    before = world.trust.facts()
    with pytest.raises(VerificationError, match=rf"(?i){why}"):
        await world.trust.take(world.jwt("warning", **changes))
    assert world.trust.facts() == before
    assert world.store.result() is None
    assert world.hooks.events == []


@pytest.mark.parametrize("text", ["", "a.b.c", "x" * (1 << 20), "eyJhbGciOiJub25lIn0.e30."])
async def test_what_is_no_result_is_refused(world, text):
    """Nothing but a VerificationError leaves the keeper."""
    with pytest.raises(VerificationError):
        await world.trust.take(text)


async def test_a_result_counts_once(world):
    """The same result again is a replay, also after another one, and after a restart."""
    world.trust.quoted(NONCE)
    jwt = world.jwt("affirming")
    await world.trust.take(jwt)
    with pytest.raises(VerificationError, match="answered before"):
        await world.trust.take(jwt)
    with pytest.raises(VerificationError, match="lately"):
        await world.restarted().take(jwt)


async def test_a_better_result_can_not_be_replayed_over_a_worse_one(world):
    """Who kept an affirming result of an open nonce can't bring it after the contraindicated one that was newer."""
    kept = world.jwt("affirming", nonce=OTHER)
    world.trust.quoted(OTHER)
    world.now += 5
    await world.take("contraindicated")
    with pytest.raises(VerificationError, match="older"):
        await world.trust.take(kept)
    assert world.trust.tier == "contraindicated"


async def test_nonces_are_bounded(world):
    """The oldest nonce is forgotten; its result comes too late."""
    world.trust.quoted(NONCE)
    for number in range(MAX_NONCES):
        world.trust.quoted(number.to_bytes(32))
    world.trust.quoted(OTHER)
    with pytest.raises(VerificationError, match="lately"):
        await world.trust.take(world.jwt(nonce=(0).to_bytes(32)))
    await world.trust.take(world.jwt(nonce=OTHER))


async def test_a_result_needs_an_enrolment(world):
    """After leaving, no result counts."""
    world.trust.quoted(NONCE)
    world.trust.end()
    with pytest.raises(VerificationError, match="not enrolled"):
        await world.trust.take(world.jwt())


async def test_what_is_worse_takes_effect_although_it_can_not_be_kept(world, monkeypatch):
    """A full disk does not keep a node trusted; what is better waits for the disk."""

    def full(_):
        raise HostError("no space")

    monkeypatch.setattr(world.store, "save_result", full)
    with pytest.raises(HostError):
        await world.take("contraindicated", withdrawn=frozenset({DIGEST}))
    assert world.trust.tier == "contraindicated"
    assert world.hooks.changes[-1] is True
    with pytest.raises(HostError):
        await world.take("affirming", nonce=OTHER)
    assert world.trust.tier == "contraindicated"


async def test_what_is_better_takes_effect_only_when_it_is_recorded(world):
    """Without its record a better result changes nothing."""
    await world.take("contraindicated")
    world.hooks.failure = AuditError("no space")
    with pytest.raises(AuditError):
        await world.take("affirming", nonce=OTHER)
    assert world.trust.tier == "contraindicated"
    world.hooks.failure = None
    await world.trust.take(world.jwt("affirming", nonce=OTHER))  # the same again: its nonce was not used up
    assert world.trust.tier == "affirming"


async def test_a_withdrawn_file_is_barred_also_after_a_restart(world):
    """By its digest, whatever the tier; until a result no longer names it."""
    await world.take("affirming", withdrawn=frozenset({DIGEST}))
    for trust in (world.trust, world.restarted()):
        assert DIGEST in trust.bars(["cd" * 32, DIGEST])
        assert trust.bars(["cd" * 32]) == ""
    await world.take("affirming", nonce=OTHER)
    assert world.trust.bars([DIGEST]) == ""


async def test_a_contraindicated_node_loads_nothing_also_after_a_restart(world):
    """Every digest is barred."""
    await world.take("contraindicated")
    assert "contraindicated" in world.trust.bars([])
    assert "contraindicated" in world.restarted().bars([])


@pytest.mark.parametrize("jwt", [None, "damaged", "another key's"])
async def test_an_enrolled_node_that_lost_its_result_loads_nothing(world, jwt):
    """It can't know what was withdrawn; the next result mends it."""
    if jwt == "another key's":
        jwt = world.jwt(key=ec.generate_private_key(ec.SECP256R1()))
    world.trust.begin(world.identity, jwt)
    assert world.trust.facts().trust == "none"
    assert world.trust.facts().attested_age_s is None
    assert "not known" in world.trust.bars([])
    await world.take("affirming")
    assert world.trust.bars([]) == ""


def test_the_age_is_never_told_too_low(world):
    """Until it is told again, at most two seconds later, the real age stays below the one that was told."""
    for passed in range(0, 200, 7):
        world.now = NOW + passed
        told = world.trust.facts().attested_age_s
        assert passed + 2 <= told < passed + 2 + AGE_STEP_S


def test_facts_stay_equal_within_a_step(world):
    """Decisions that were remembered stay so for a step of the age."""
    told = []
    for passed in range(100):
        world.now = NOW + passed
        told.append(world.trust.facts())
    assert len({facts.attested_age_s for facts in told}) <= 100 // AGE_STEP_S + 1


@pytest.mark.parametrize(("ahead", "age"), [(1, 0), (FUTURE_S, 0), (FUTURE_S + 1, -FUTURE_S - 1), (10**6, -(10**6))])
def test_a_result_from_the_future_has_a_negative_age(world, ahead, age):
    """Clocks differ by a minute; beyond, the age is negative, which the shipped policy denies."""
    world.now = NOW - ahead
    assert world.trust.age_s() == age
    told = world.trust.facts().attested_age_s
    assert (told < 0) == (age < 0)


async def test_a_controller_whose_clock_was_wrong_once_is_heard_again(world):
    """A result that lies in the future does not silence those that come after it."""
    await world.take("affirming", issued_at=NOW + 10**6)
    assert world.trust.facts().attested_age_s < 0
    await world.take("affirming", nonce=OTHER)
    assert world.trust.age_s() == 0


def test_connected_holds_for_two_and_a_half_intervals(world):
    """By the monotonic clock, and by the interval that the last result named."""
    assert world.trust.connected()[0] is True
    world.monotonic_us = 150_000_000
    assert world.trust.connected()[0] is True
    world.monotonic_us = 151_000_000
    assert world.trust.connected() == (False, "https://controller.example has not appraised this node for 151 s")
    world.monotonic_us = 0
    assert "since the agent's start" in world.restarted().connected()[1]
