"""kill -9 of a controller at any moment of its work: whatever it had told anybody, the next one knows."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random  # noqa: TID251 -- seeded below
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.typedefs import Handler
from sqlalchemy import select, update

from agent.attest.enrolment import CHALLENGE_PATH, EVIDENCE_PATH, ChallengeRequest, JoinToken, PushedEvidence
from agent.attest.measurement import model_entry, refused_entry
from agent.attest.result import AttestationResult, CheckResult
from agent.audit.merkle import leaf_hash, tree_root
from agent.identity.token import parse_jwks
from controller.settings import load
from controller.store import audit
from controller.store.database import Database
from controller.store.schema import audit as audit_rows
from controller.store.schema import deliveries, events, results, states, tokens
from tests.support.attest import MODEL, digest
from tests.support.controller_service import ControllerProcess, Desk, access, controller_home, eventually
from tests.support.receiver import Receiver
from tests.support.software_node import SoftwareNode, Vendor

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]
SEED = 20_263
ROUNDS = 2  # each kills at each of the moments below
NODES = 6
VENDOR = Vendor()
_MOMENTS = ("asked", "told", "event", "token", "granted", "answered", "time")  # what a kill waits for
_US = 1_000_000


@dataclass
class Fuse:
    """Kills the controller when something has happened so many times from now."""

    controller: ControllerProcess
    what: str = ""
    left: int = 0

    def lit(self, what: str, left: int) -> None:
        self.what, self.left = what, left

    def burn(self, what: str) -> None:
        if what == self.what and self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.controller.kill()


@dataclass
class Witness(SoftwareNode):
    """A node whose state changes now and then, and that remembers each nonce that it quoted, in order."""

    chance: random.Random = field(default_factory=random.Random)
    fuse: Fuse | None = None
    restless: bool = True
    nonces: list[str] = field(default_factory=list)

    def evidence(self, nonce: bytes, start: int = 0, **claims: Any) -> Any:
        self.nonces.append(nonce.hex())
        if self.restless and start and self.chance.random() < 0.4:
            refused = self.entries[-1].path.startswith("edgewarden/refused")
            entry = model_entry("m", "1", "model.onnx", MODEL)
            self.entries.append(entry if refused else refused_entry("m", "1", "model.onnx", digest("other")))
        clock = self.attester.clock
        self.attester.clock = replace(clock, clock=clock.clock + 1)
        self._burn("asked")
        return super().evidence(nonce, start, **claims)

    def told(self) -> list[AttestationResult]:
        keys = parse_jwks(self.grant["jwks"].encode())
        return [AttestationResult.verify(token, keys, self.id) for token in [self.grant["result"], *self.results]]

    def _burn(self, what: str) -> None:
        if self.fuse is not None:
            self.fuse.burn(what)

    def application(self) -> web.Application:
        @web.middleware
        async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
            answer = await handler(request)
            if request.method == "PUT":
                self._burn("told")
            return answer

        application = super().application()
        application.middlewares.append(watch)
        return application


@dataclass
class Hearer(Receiver):
    """A receiver of webhooks at which the controller may die."""

    fuse: Fuse | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        answer = await super().handle(request)
        if self.fuse is not None:
            self.fuse.burn("event")
        return answer


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request, tmp_path):
    poll = {"interval_s": 1, "timeout_s": 1}
    options = ["--database", request.getfixturevalue("postgres_url")] if request.param == "postgresql" else []
    return controller_home(tmp_path, VENDOR.pem(), *options, poll=poll)


@dataclass
class Trial:
    """A controller that is killed, its nodes, and what it has acknowledged.

    Attributes:
        nodes: those whose enrolment was granted; the first pushes, the others are polled.
        tokens: ids of the join tokens that were given.
    """

    config: Path
    stack: contextlib.AsyncExitStack
    controller: ControllerProcess
    fuse: Fuse
    chance: random.Random
    nodes: list[Witness] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    _begun: int = 0

    async def live(self, what: str) -> None:
        """Let the controller work until the fuse has burnt; meanwhile a node enrols, another pushes, and tokens are made."""
        self.fuse.lit(what, 1 if what == "granted" else self.chance.randint(1, 3 * NODES))
        wait_s = self.chance.uniform(0.1, 3)
        print("kill at", what, self.fuse.left, wait_s)  # noqa: T201 -- a simulation prints what it does
        if what == "time":
            asyncio.get_running_loop().call_later(wait_s, self.controller.kill)
        async with access(self.config, self.controller.url) as office:
            work = (self.enrol(office), self.push(office), self.make_tokens(office))
            ends = await asyncio.gather(*work, return_exceptions=True)
        assert all(end is None or isinstance(end, aiohttp.ClientError) for end in ends), ends

    async def enrol(self, office: Desk) -> None:
        number, self._begun = self._begun, self._begun + 1
        chance = random.Random(SEED + number)  # noqa: S311 -- of its own, so that the kills are the same in each run
        node = Witness(id=f"edge-{number}", vendor=VENDOR, chance=chance, fuse=self.fuse)
        runner = await node.serve()
        self.stack.push_async_callback(runner.cleanup)
        token = await self.make_token(office)
        await node.enrol(office.anyone, office.url, token, mode="pull" if self.nodes else "push")
        self.nodes.append(node)
        self.fuse.burn("granted")

    async def make_token(self, office: Desk) -> JoinToken:
        token = await office.token()
        self.tokens.add(token.id)
        self.fuse.burn("token")
        return token

    async def make_tokens(self, office: Desk) -> None:
        while True:
            await self.make_token(office)
            await asyncio.sleep(0.02)

    async def push(self, office: Desk) -> None:
        node = self.nodes[0]
        while True:
            challenge = await self._post(office, CHALLENGE_PATH, ChallengeRequest(node=node.id))
            evidence = node.evidence(bytes.fromhex(challenge["nonce"]), challenge["from"])
            pushed = PushedEvidence(node=node.id, nonce=challenge["nonce"], evidence=evidence, csr=node.csr())
            node.results.append((await self._post(office, EVIDENCE_PATH, pushed))["result"])
            self.fuse.burn("answered")
            await asyncio.sleep(0.1)

    async def _post(self, office: Desk, path: str, message: ChallengeRequest | PushedEvidence) -> Any:
        async with office.anyone.post(office.url + path, data=message.encode()) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def check(self, receiver: Receiver | None = None) -> None:
        """Look into the books while no controller runs; with a receiver whether it got all."""
        database = await Database.open(load(self.config).database)
        try:
            await check_books(database, self.nodes, self.tokens)
            if receiver is not None:
                await check_events(database, receiver)
            await end_leases(database)
        finally:
            await database.close()


async def test_what_was_told_is_kept(config):
    """A controller that is killed in the middle of its work loses no result that a node was told, no grant, token, record or event; polling goes on."""
    print("seed", SEED)  # noqa: T201 -- a simulation prints its seed
    controller = ControllerProcess(config)
    fuse = Fuse(controller)
    async with contextlib.AsyncExitStack() as stack:
        chance = random.Random(SEED)  # noqa: S311 -- moments of a kill, nothing secret
        trial = Trial(config, stack, controller, fuse, chance)
        receiver = await stack.enter_async_context(Hearer(fuse=fuse).serving())
        await stack.enter_async_context(controller)
        async with access(config, controller.url) as office:
            await office.approve()
            await office.call("POST", "/v1/hooks", {"url": receiver.url}, expect=201)
            for _ in range(NODES):
                await trial.enrol(office)
        moments = list(_MOMENTS) * ROUNDS
        chance.shuffle(moments)
        for moment in moments:
            await trial.live(moment)
            assert await controller.wait() == -9
            await trial.check()
            await controller.start()
        for node in trial.nodes:
            node.restless = False
        before = {node.id: len(node.results) for node in trial.nodes[1:]}

        async def all_told_and_delivered():
            told = all(len(node.results) >= before[node.id] + 2 for node in trial.nodes[1:])
            (hook,) = await office.call("GET", "/v1/hooks")
            return told and hook["pending"] == 0

        async with access(config, controller.url) as office:
            await eventually(all_told_and_delivered, 60)
        await controller.stop()
        await trial.check(receiver)
        # It was about something: results changed, in each way of being told, and new nodes came.
        told = [result.status for node in trial.nodes for result in node.told()]
        assert min(told.count("affirming"), told.count("warning")) >= len(moments)
        assert len(trial.nodes) > NODES


async def end_leases(database: Database) -> None:
    """Let what the dead replica has claimed be tried again now, not in two minutes."""
    async with database.begin() as connection:
        await connection.execute(update(deliveries).where(deliveries.c.due_us.is_not(None)).values(due_us=0))


async def rows(database: Database, query: Any) -> list[Any]:
    async with database.begin() as connection:
        return list(await connection.execute(query))


async def check_books(database: Database, nodes: list[Witness], given: set[str]) -> None:
    """What was told is in the history, and history, audit log and events tell the same."""
    # 1. The audit log is whole: its records number themselves, and its head is the tree over them.
    records = [row.record for row in await rows(database, select(audit_rows).order_by(audit_rows.c.sequence))]
    async with database.begin() as connection:
        head = await audit.head(connection)
    said = [msgspec.json.decode(record) for record in records]
    assert [record["sequence"] for record in said] == list(range(head.size))
    assert tree_root(leaf_hash(record) for record in records).hex() == head.root

    # 2. Each result in the history has its record and its event, and there is none of another.
    history = defaultdict(list)
    for row in await rows(database, select(results).order_by(results.c.id)):
        history[row.node].append(row)
    recorded = defaultdict(list)
    for record in said:
        if record["kind"] == "node.result":
            recorded[record["node"]].append(record["detail"]["status"])
    news = defaultdict(list)
    for row in await rows(database, select(events).where(events.c.kind == "node.result").order_by(events.c.created_us)):
        news[row.node].append(msgspec.json.decode(row.body)["status"])
    kept = {node: [row.status for row in of_node] for node, of_node in history.items()}
    assert recorded == kept
    assert news == kept

    # 3. Each result that a node was told is in its history, at its time, and the newest is what the controller thinks, or something newer.
    last = {row.node: row for row in await rows(database, select(states))}
    for node in nodes:
        told = node.told()
        for result in told:
            assert any(_is_of(result, *span) for span in _spans(history[node.id])), (node.id, result)
        assert node.nonces.index(last[node.id].nonce) >= node.nonces.index(told[-1].nonce)

    # 4. Each token that was given is known, and recorded.
    made = {record["detail"]["token"] for record in said if record["kind"] == "token.create"}
    assert given <= made
    assert made == {row.id for row in await rows(database, select(tokens.c.id))}


def _spans(history: list[Any]) -> Iterator[tuple[Any, float]]:
    """Each row with when the next began, in seconds."""
    ends = [row.first_us / _US for row in history[1:]]
    return zip(history, [*ends, math.inf], strict=True)


def _is_of(result: AttestationResult, row: Any, end: float) -> bool:
    checks = msgspec.json.decode(row.checks, type=tuple[CheckResult, ...])
    is_then = row.first_us // _US <= result.issued_at <= end
    return is_then and (result.status, result.checks) == (row.status, checks)


async def check_events(database: Database, receiver: Receiver) -> None:
    """Each event reached the receiver, always with the same bytes, and nothing else did."""
    written = {row.id: row.body for row in await rows(database, select(events))}
    assert {got.id: got.body for got in receiver.got} == written
    assert len({(got.id, got.body) for got in receiver.got}) == len(written)
    assert all(row.delivered_us is not None for row in await rows(database, select(deliveries)))
