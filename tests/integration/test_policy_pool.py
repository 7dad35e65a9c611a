"""The policy processes for real, confined: activation, hostile policies, deaths, and both engines with one suite."""

import asyncio
import contextlib
import os

import pytest

from agent.errors import ConfigError, IsolationError, PolicyError, VerificationError
from agent.isolation.sandbox import Limits
from agent.isolation.supervisor import Zygote
from agent.policy import pool as rules
from agent.policy.build import sign
from agent.policy.client import PolicyClient
from agent.policy.generation import Generation
from agent.policy.messages import Endpoint
from agent.policy.opa_server import OpaProgram
from agent.policy.pool import PRELOAD, Activation, PolicyPool
from agent.records import DENY_ALL
from tests.support.policy import HOSTILE, MEMORY, OPA, RECURSION, SAMPLES, bundle, document, keypair, until

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]
LIMITS = Limits(headroom_bytes=256 << 20, open_files=64)
DEADLINE_S, TOTAL_S = 0.5, 5.0
ATTACK = HOSTILE + RECURSION + MEMORY
NOBODY = 65534


@pytest.fixture(scope="module")
def zygote():
    started = Zygote.start(PRELOAD, user=(NOBODY, NOBODY) if os.getuid() == 0 else None)
    yield started
    started.close()


class Asker:
    """A client with a subscription of its own."""

    def __init__(self, pool: PolicyPool, total_s: float = TOTAL_S) -> None:
        self.overruns: list[int] = []
        self.client = PolicyClient(self._overrun, deadline_s=DEADLINE_S, total_deadline_s=total_s)
        self.subscription = pool.subscribe(self.client.attach)

    def _overrun(self, number: int) -> None:
        self.overruns.append(number)
        self.subscription.overrun(number)

    async def ready(self) -> None:
        await until(lambda: self.client.workers == rules.WORKERS_PER_ASKER)

    async def ask(self, action: str):
        return await self.client.decide(document(action))


@contextlib.asynccontextmanager
async def pooled(zygote, data: bytes | None = None, opa: bool = False, **more):
    """A pool with this policy in force, and one asker with both its workers."""
    pool = PolicyPool(
        zygote,
        **{
            "limits": LIMITS,
            "samples": SAMPLES,
            "deadline_s": DEADLINE_S,
            "total_deadline_s": TOTAL_S,
            "opa": OpaProgram(str(OPA)) if opa else None,
            **more,
        },
    )
    asker = Asker(pool)
    running = asyncio.create_task(pool.run())
    try:
        if data is not None:
            await pool.start(data)
            await asker.ready()
        yield pool, asker
        assert not running.done()
    finally:
        asker.client.close()
        await pool.close()
        await running


ENGINES = pytest.mark.parametrize("opa", [False, True], ids=["embedded", "opa"])


@ENGINES
async def test_both_engines_decide_alike(zygote, opa):
    """Allow, deny, undefined, wrong shapes, builtin errors and giant output have the same outcome in each engine."""
    async with pooled(zygote, bundle(HOSTILE), opa) as (_, asker):
        allowed = await asker.ask("infer")
        denied = await asker.ask("open")
        failed = {
            action: await asker.ask(action)
            for action in ("nothing known", "wrong type", "unknown field", "builtin error", "giant output")
        }
    assert (allowed.decision.allow, allowed.error) == (True, None)
    assert (denied.decision.allow, denied.decision.reasons, denied.error) == (False, ("not today",), None)
    for answer in failed.values():
        assert answer.decision == DENY_ALL
    words = ("undefined", "malformed", "malformed", "", "over")
    for (action, answer), word in zip(failed.items(), words, strict=True):
        assert answer.error is not None, action
        assert word in answer.error, action


@ENGINES
async def test_an_endless_loop_harms_nobody_else(zygote, opa):
    """Eight other askers of the same worker lose nothing while loops are killed, and the policy stays in force."""

    async def good(asker: Asker) -> list[str | None]:
        return [(await asker.ask("infer")).error for _ in range(15)]

    async with pooled(zygote, bundle(HOSTILE), opa) as (pool, asker):
        before = pool.active
        *others, loop = await asyncio.gather(*(good(asker) for _ in range(8)), asker.ask("loop"))
        again = await asker.ask("loop")
        assert pool.active == before
        await asker.ready()
        assert (await asker.ask("infer")).decision.allow
    assert loop.decision == again.decision == DENY_ALL
    assert "took over" in (loop.error or "")
    assert len(asker.overruns) == 2
    assert others == [[None] * 15] * 8


@pytest.mark.parametrize("action", ["recursion", "memory"])
async def test_a_policy_that_kills_its_worker_costs_one_question(zygote, action):
    """A stack overflow and a memory bomb end the worker; its question is denied, the others are answered."""
    async with pooled(zygote, bundle(ATTACK)) as (pool, asker):
        bad, *good = await asyncio.gather(asker.ask(action), *(asker.ask("infer") for _ in range(8)))
        await asker.ready()
        assert (await asker.ask("infer")).decision.allow
        assert pool.active is not None
    assert "died" in (bad.error or "")
    assert [answer.error for answer in good] == [None] * 8
    assert asker.overruns == []


@ENGINES
async def test_a_new_policy_takes_over_and_loses_nothing(zygote, opa):
    """Under load every question is answered by the old or the new policy, by its digest, and none fails."""
    other = HOSTILE.replace("not today", "never")
    async with pooled(zygote, bundle(HOSTILE), opa) as (pool, asker):
        old = pool.active
        stop = asyncio.Event()

        async def load() -> list[tuple[str, str, str | None]]:
            seen = []
            while not stop.is_set():
                answer = await asker.ask("open")
                seen.append((answer.policy_sha256, *answer.decision.reasons, answer.error))
            return seen

        asking = asyncio.gather(load(), load())
        new = await pool.activate(bundle(other, manifest={"revision": "two", "roots": ["edgewarden"]}))
        after = await asker.ask("open")
        stop.set()
        seen = {answer for answers in await asking for answer in answers}
        assert pool.active == new
    assert old is not None
    assert new.revision == "two"
    assert seen <= {(old.sha256, "not today", None), (new.sha256, "never", None)}
    assert (after.policy_sha256, after.decision.reasons, after.error) == (new.sha256, ("never",), None)


def bad_bundles() -> dict[str, tuple[bytes, type[Exception], str]]:
    undefined = 'package edgewarden.authz\ndecision := {"allow": true} if input.action == "never"'
    spin = "package edgewarden.authz\nx := [1 | some a in numbers.range(1, 20000); some b in numbers.range(1, 20000); a * b == 0]"
    authz = "package edgewarden.authz\n"
    return {
        "no archive": (b"x", VerificationError, "bundle-archive"),
        "too large": (bytes(17 << 20), PolicyError, "over"),
        "syntax": (bundle("package edgewarden\nx := {"), PolicyError, "does not load"),
        "no decision": (bundle("package edgewarden.authz\nx := 1"), PolicyError, "trial failed: sample 'infer'.*undefined"),
        "undefined": (bundle(undefined), PolicyError, "trial failed: sample 'infer'.*undefined"),
        "wrong shape": (bundle(f"{authz}decision := true"), PolicyError, "trial failed.*malformed"),
        "hidden error": (bundle(HOSTILE, "package other\nx := y if { y > 1 }"), PolicyError, "unsafe"),
        "missing builtin": (bundle(f"{authz}decision := io.jwt.decode(input.x)"), PolicyError, "io.jwt.decode"),
        "data over rules": (bundle(HOSTILE, data={"edgewarden": {"authz": {}}}), PolicyError, "override"),
        "deep brackets": (bundle(f"{authz}x := {'[' * 30}{']' * 30}"), PolicyError, "nested 30 deep"),
        "loop at load": (bundle(spin), PolicyError, "cannot be loaded.*did not answer.*SIGKILL"),
        "recursion at load": (bundle(authz + "f(n) := f(n + 1)\nx := f(1)"), PolicyError, "cannot be loaded.*SIG"),
        "memory at load": (bundle(f"{authz}x := numbers.range(1, 2000000000)"), PolicyError, "cannot be loaded"),
        "loop in trial": (
            bundle(HOSTILE.replace('input.action == "loop"', 'input.action == "infer"').replace(
                'decision := {"allow": true} if input.action == "infer"\n', "")),
            PolicyError,
            "trial failed: sample 'infer': the evaluation took over",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_bundles())
async def test_a_refused_bundle_leaves_the_old_policy_in_force(zygote, name):
    """Each bad bundle is refused with its reason, is never measured, and the old policy goes on untouched."""
    data, kind, words = bad_bundles()[name]
    measured: list[Activation] = []

    async def measure(activation: Activation) -> None:
        measured.append(activation)

    async with pooled(zygote, bundle(HOSTILE), load_timeout_s=1.5) as (pool, asker):
        before, workers = pool.active, asker.subscription.workers
        with pytest.raises(kind, match=words):
            await pool.activate(data, measure)
        assert pool.active == before
        assert asker.subscription.workers == workers
        assert (await asker.ask("infer")).decision.allow
    assert measured == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package edgewarden.authz\nx := {", "OPA does not take the bundle"),
        ('package edgewarden.authz\nx := http.send({"url": input.x, "method": "get"})', "opens no connection"),
    ],
)
async def test_opa_refuses_what_it_must(zygote, source, words):
    """A bundle that OPA cannot compile, or that would call out, is refused and nothing is left running."""
    async with pooled(zygote, opa=True) as (pool, _):
        with pytest.raises(PolicyError, match=words):
            await pool.start(bundle(source))
        assert pool.active is None


async def test_opa_refuses_data_over_rules_too(zygote):
    """What would override a rule is refused whichever engine decides."""
    async with pooled(zygote, opa=True) as (pool, _):
        with pytest.raises(PolicyError):
            await pool.start(bundle(HOSTILE, data={"edgewarden": {"authz": {"decision": {"allow": True}}}}))


async def test_only_what_a_trusted_key_signed_is_activated(zygote):
    """With keys trusted, an unsigned bundle and a stranger's are refused; a bad key is the operator's error."""
    private, public = keypair()
    plain = bundle(HOSTILE)
    async with pooled(zygote, sign(plain, private), trusted_keys=[public]) as (pool, asker):
        for bad in (plain, sign(plain, keypair(1)[0])):
            with pytest.raises(VerificationError, match="bundle-signature"):
                await pool.activate(bad)
        assert (await asker.ask("infer")).decision.allow
    async with pooled(zygote, trusted_keys=[b"no key"]) as (pool, _):
        with pytest.raises(ConfigError):
            await pool.start(sign(plain, private))


async def test_nobody_gets_a_policy_before_it_is_measured(zygote):
    """The measurement runs after the trial and before the first hand-over; if it fails the old policy goes on."""
    seen: list[tuple[Activation, int]] = []
    async with pooled(zygote) as (pool, asker):

        async def measure(activation: Activation) -> None:
            seen.append((activation, asker.client.workers))

        async def fail(_activation: Activation) -> None:
            raise IsolationError("no TPM")

        with pytest.raises(IsolationError, match="no TPM"):
            await pool.start(bundle(HOSTILE), fail)
        assert pool.active is None
        activation = await pool.start(bundle(HOSTILE), measure)
        await asker.ready()
        with pytest.raises(IsolationError, match="no TPM"):
            await pool.activate(bundle(ATTACK), fail)
        assert pool.active == activation
        assert (await asker.ask("infer")).policy_sha256 == activation.sha256
    assert seen == [(activation, 0)]


async def test_the_same_bytes_again_change_nothing(zygote):
    """Activating what is in force keeps the workers and is not measured twice."""
    measured: list[Activation] = []

    async def measure(activation: Activation) -> None:
        measured.append(activation)

    async with pooled(zygote) as (pool, asker):
        await pool.start(bundle(HOSTILE), measure)
        await asker.ready()
        numbers = set(asker.subscription._workers)
        await pool.activate(bundle(HOSTILE), measure)
        assert set(asker.subscription._workers) == numbers
    assert len(measured) == 1


async def test_workers_and_templates_that_die_are_replaced(zygote):
    """A killed worker is replaced; a killed template is started again from the same bytes when a worker is wanted."""
    async with pooled(zygote, bundle(HOSTILE)) as (pool, asker):
        generation = pool._generation
        assert generation is not None
        assert generation._template is not None
        generation._template.handle.kill()
        await generation._template.handle.wait()
        assert (await asker.ask("infer")).decision.allow
        first = set(asker.subscription._workers)
        for number in first:
            asker.subscription.overrun(number)
        await until(lambda: len(set(asker.subscription._workers) - first) == 2)
        await asker.ready()
        assert (await asker.ask("infer")).policy_sha256 == generation.sha256
        assert not pool.crash_loop


async def test_workers_that_keep_dying_are_a_crash_loop(zygote):
    """Deaths one after the other back off and become a fact for health."""
    async with pooled(zygote, bundle(HOSTILE)) as (pool, asker):
        while not pool.crash_loop:
            for number in list(asker.subscription._workers):
                asker.subscription.overrun(number)
            await asyncio.sleep(0.01)
        assert pool.active is not None


async def test_an_asker_can_end_only_its_own_workers(zygote):
    """A number that belongs to another asker is ignored; a closed asker's workers end, the other's live."""
    async with pooled(zygote, bundle(HOSTILE)) as (pool, asker):
        other = Asker(pool)
        await other.ready()
        for number in list(other.subscription._workers):
            asker.subscription.overrun(number)
        asker.subscription.overrun(0)
        assert [(await other.ask("infer")).error for _ in range(3)] == [None] * 3
        assert other.client.workers == 2
        other.subscription.close()
        await until(lambda: other.subscription.workers == 0)
        await pool.activate(bundle(ATTACK))
        assert other.subscription.workers == 0
        assert (await asker.ask("infer")).decision.allow
        other.client.close()


async def test_an_asker_that_keeps_old_workers_loses_them(zygote, monkeypatch):
    """A policy that is out decides nothing after the drain time, whatever its asker does."""
    monkeypatch.setattr(rules, "DRAIN_S", 0.05)
    async with pooled(zygote, bundle(HOSTILE)) as (pool, _):
        kept: list[Endpoint] = []
        deaf = pool.subscribe(kept.append)
        await until(lambda: deaf.workers == 2)
        await pool.activate(bundle(ATTACK))
        await until(lambda: len(kept) == 4)
        await until(lambda: deaf.workers == 2)
        for endpoint in kept:
            endpoint.close()


async def test_a_policy_that_returns_is_not_retired_with_its_former_self(zygote, monkeypatch):
    """Going back to a policy within the drain time leaves its new workers alone."""
    monkeypatch.setattr(rules, "DRAIN_S", 0.2)
    async with pooled(zygote, bundle(HOSTILE)) as (pool, asker):
        await pool.activate(bundle(ATTACK))
        await pool.activate(bundle(HOSTILE))
        await until(lambda: asker.subscription.workers == 2 and asker.client.workers == 2)
        numbers = set(asker.subscription._workers)
        await asyncio.sleep(0.3)
        assert set(asker.subscription._workers) == numbers
        assert (await asker.ask("infer")).decision.allow


async def test_a_slow_hand_over_does_not_hold_the_activation(zygote, monkeypatch):
    """When an asker cannot be served in time the activation stands, and is loud about it."""
    monkeypatch.setattr(rules, "_HAND_OVER_S", 0.0)
    async with pooled(zygote, bundle(HOSTILE)) as (pool, asker):
        activation = await pool.activate(bundle(ATTACK))
        await until(lambda: asker.client.policy_sha256 == activation.sha256)


async def test_a_defect_of_an_asker_ends_the_pool(zygote):
    """A programming error in a task is not swallowed: ``run`` raises it."""
    pool = PolicyPool(zygote, limits=LIMITS, samples=SAMPLES, deadline_s=DEADLINE_S, total_deadline_s=TOTAL_S)
    await pool.start(bundle(HOSTILE))

    def broken(endpoint) -> None:
        endpoint.close()
        raise ZeroDivisionError

    pool.subscribe(broken)
    with pytest.raises(ZeroDivisionError):
        await pool.run()
    await pool.close()


async def load(zygote, data: bytes, **more) -> Generation:
    settings = {"trusted_keys": (), "limits": LIMITS, "load_timeout_s": 10, **more}
    return await Generation.load(zygote, data, **settings)


async def test_a_retired_policy_forks_no_more(zygote):
    """After its end a generation refuses; ending it twice is no error."""
    generation = await load(zygote, bundle(HOSTILE))
    generation.close()
    generation.close()
    with pytest.raises(IsolationError, match="retired"):
        await generation.fork()


@pytest.mark.parametrize("entry", ["lies", "mute", "talks", "babbles", "deserts"])
async def test_a_template_that_lies_is_refused(zygote_of_liars, entry, monkeypatch):
    """A template that read other bytes, answers out of turn, talks nonsense, is silent, or dies, gives no policy."""
    monkeypatch.setattr("agent.policy.generation._ENTRY", f"tests.support.policy_entries:{entry}")
    with pytest.raises(PolicyError):
        await load(zygote_of_liars, bundle(HOSTILE), load_timeout_s=0.5)


async def test_the_machines_fault_is_not_the_bundles(zygote_of_liars, monkeypatch):
    """A template that blames the machine gives an isolation error."""
    monkeypatch.setattr("agent.policy.generation._ENTRY", "tests.support.policy_entries:refuses")
    with pytest.raises(IsolationError, match="not sealed"):
        await load(zygote_of_liars, bundle(HOSTILE))


async def test_a_successor_that_fails_is_tried_again(zygote_of_liars, monkeypatch):
    """When the template's successor refuses, workers are missing for a while, and come back with the next one."""
    async with pooled(zygote_of_liars, bundle(HOSTILE)) as (pool, asker):
        generation = pool._generation
        assert generation is not None
        assert generation._template is not None
        with monkeypatch.context() as patch:
            patch.setattr("agent.policy.generation._ENTRY", "tests.support.policy_entries:lies")
            failed = generation._template
            failed.handle.kill()
            await failed.handle.wait()
            for number in list(asker.subscription._workers):
                asker.subscription.overrun(number)
            await until(lambda: len(pool._backoff._deaths) > 3)
            assert asker.client.workers == 0
        await asker.ready()
        assert (await asker.ask("infer")).decision.allow


async def test_a_worker_that_comes_too_late_is_let_go(zygote):
    """An asker that left while its worker was forked gets none, and none is left behind."""
    async with pooled(zygote, bundle(HOSTILE)) as (pool, _):
        got: list[Endpoint] = []
        pool.subscribe(got.append).close()
        late = pool.subscribe(got.append)
        await asyncio.sleep(0)  # its forks are asked for
        late.close()
        await until(lambda: len(pool._tasks) == rules.WORKERS_PER_ASKER)
        assert got == []


@pytest.mark.parametrize("entry", ["stranger", "barren", "silent"])
async def test_a_template_that_cannot_fork_gives_no_worker(zygote_of_liars, entry, monkeypatch):
    """A pid that is no child of the agent, a refusal and silence are isolation errors."""
    monkeypatch.setattr("agent.policy.generation._ENTRY", f"tests.support.policy_entries:{entry}")
    monkeypatch.setattr("agent.policy.generation._FORK_TIMEOUT_S", 0.5)
    generation = await load(zygote_of_liars, bundle(HOSTILE))
    with pytest.raises(IsolationError):
        await generation.fork()
    generation.close()


@pytest.fixture(scope="module")
def zygote_of_liars():
    started = Zygote.start([*PRELOAD, "tests.support.policy_entries"])
    yield started
    started.close()


async def test_opa_that_dies_is_started_again(zygote):
    """Without its server a policy denies; the server comes back on the same bytes, and the policy decides again."""
    async with pooled(zygote, bundle(HOSTILE), opa=True) as (pool, asker):
        generation = pool._generation
        assert generation is not None
        server = generation._server
        assert server is not None
        dead, keeping = server._process, server._keeping
        assert dead is not None
        assert keeping is not None
        keeping.cancel()  # on a quick machine it would be back before it is asked
        dead.kill()
        await dead.wait()
        denied = await asker.ask("infer")
        assert denied.decision == DENY_ALL
        server._keeping = asyncio.create_task(server._keep(dead))
        while (answer := await asker.ask("infer")).error is not None:  # noqa: ASYNC110 -- OPA sets no event of this loop
            await asyncio.sleep(0.1)
        assert answer.decision.allow
