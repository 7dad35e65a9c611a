"""A gateway that dies while it is given its models, or that says what it may not: nothing waits for it, and the next one gets the right files."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import messages
from agent.errors import AuditError
from agent.flows.dataplane import Dataplane, ServedModel
from agent.isolation.channel import AsyncChannel, Frame, channel_pair
from agent.isolation.memfd import seal_bytes
from agent.isolation.process import ExitStatus
from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildSpec
from agent.records import AuditEvent


class Gateway:
    """The other end of a data plane's channel, in this process; stands for the sandboxed child that the zygote forks."""

    def __init__(self) -> None:
        self.sock, theirs = channel_pair()
        self.pid = 1
        self.ended = asyncio.Event()
        self.loads: asyncio.Queue[tuple[messages.LoadModel, list[bytes]]] = asyncio.Queue()
        self.others: list[Any] = []
        self.acknowledged: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()
        self._channel = AsyncChannel(theirs, self._frame, self.ended.set)

    def _frame(self, frame: Frame) -> None:
        if frame.data.startswith(messages.ACKNOWLEDGE):
            self.acknowledged.put_nowait(messages.split_hot_frame(frame.data, messages.ACKNOWLEDGE))
            return
        message = messages.decode_agent_message(frame.data)
        if isinstance(message, messages.LoadModel):
            self.loads.put_nowait((message, [os.pread(fd, 1000, 0) for fd in frame.fds]))
        else:
            self.others.append(message)
        frame.close_fds()

    def say(self, message: messages.GatewayMessage) -> None:
        self._channel.send(messages.encode(message))

    def say_bytes(self, frame: bytes, fds: tuple[int, ...] = ()) -> None:
        self._channel.send(frame, fds)

    def die(self) -> None:
        self._channel.close()

    def kill(self, _: int = 9) -> None:
        self._channel.close()

    async def wait(self) -> ExitStatus:
        await self.ended.wait()
        return ExitStatus(signal=9)


class Hooks:
    """Stands for the node."""

    def __init__(self) -> None:
        self.recorded: list[AuditEvent] = []
        self.pending: list[asyncio.Future[Any]] = []
        self.refusal: AuditError | None = None
        self.facts: list[tuple[bool, str]] = []

    def record(self, event: AuditEvent, size: int) -> asyncio.Future[Any]:
        assert size > 0
        if self.refusal:
            raise self.refusal
        self.recorded.append(event)
        self.pending.append(asyncio.get_running_loop().create_future())
        return self.pending[-1]

    def subscribe(self, _: Callable[..., None]) -> "Hooks":
        return self

    def close(self) -> None: ...

    def serving(self, *, holds: bool, why: str) -> None:
        self.facts.append((holds, why))

    def statistics(self, report: messages.Statistics | None) -> None: ...


class Births:
    """Stands for the zygote."""

    hooks: Hooks

    def __init__(self) -> None:
        self.born: asyncio.Queue[Gateway] = asyncio.Queue()

    async def spawn(self, _: ChildSpec) -> Gateway:
        gateway = Gateway()
        self.born.put_nowait(gateway)
        return gateway


@pytest.fixture
def models() -> Iterator[Callable[[str, bytes], ServedModel]]:
    made = []

    def make(name: str, content: bytes) -> ServedModel:
        file = seal_bytes(name, content)
        made.append(file)
        return ServedModel(name, "1", "d" * 64, "s" * 64, {"model.onnx": file})

    yield make
    for file in made:
        file.close()


@pytest.fixture
async def plane():
    births: Any = Births()  # it and the hooks stand in by their behaviour
    hooks: Any = Hooks()
    births.hooks = hooks
    dataplane = Dataplane(births, ChildSpec(Profile.GATEWAY, "none:none", Limits(1 << 30, 64)), hooks)
    running = asyncio.create_task(dataplane.run())
    yield dataplane, births
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_gateway_that_dies_over_a_model_leaves_it_to_the_next(plane, models):
    """The hand-over ends without an error, and the next gateway is given the same bytes."""
    dataplane, births = plane
    first = await births.born.get()
    loading = asyncio.create_task(dataplane.load(models("a", b"weights")))
    await first.loads.get()
    first.die()
    assert await loading == ""
    second = await births.born.get()
    load, files = await second.loads.get()
    assert (load.name, files) == ("a", [b"weights"])


async def test_a_gateway_that_dies_during_its_start_is_replaced_at_once(plane, models):
    """Nobody waits for the sessions of a process that has ended."""
    dataplane, births = plane
    first = await births.born.get()
    first.die()
    assert await dataplane.load(models("a", b"weights")) == ""
    second = await births.born.get()
    await second.loads.get()
    second.die()
    third = await births.born.get()
    load, _ = await third.loads.get()
    third.say(messages.ModelReport(load.number))
    async with asyncio.timeout(10):
        while messages.Serve() not in third.others:  # noqa: ASYNC110 -- a list that a callback fills
            await asyncio.sleep(0.01)


async def test_a_model_that_is_unloaded_while_a_gateway_starts_is_not_sent_afterwards(plane, models):
    """What is handed over is sent before anything else happens: its descriptors may be another file's later."""
    dataplane, births = plane
    first = await births.born.get()
    loaded = asyncio.create_task(dataplane.load(models("a", b"weights")))
    load, _ = await first.loads.get()
    first.say(messages.ModelReport(load.number))
    await loaded
    first.die()
    second = await births.born.get()
    _, (content,) = await second.loads.get()
    dataplane.unload("a", "1")
    assert content == b"weights"
    async with asyncio.timeout(10):
        while messages.UnloadModel("a", "1") not in second.others:  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.01)
    assert second.loads.empty()


async def test_two_hand_overs_of_one_model_have_an_answer_each(plane, models):
    """A report names its hand-over: a package that was replaced while its gateway started leaves nobody waiting."""
    dataplane, births = plane
    gateway = await births.born.get()
    one = asyncio.create_task(dataplane.load(models("a", b"one")))
    two = asyncio.create_task(dataplane.load(models("a", b"two")))
    numbers = [(await gateway.loads.get())[0].number for _ in range(2)]
    gateway.say(messages.ModelReport(numbers[1]))
    assert await two == ""
    gateway.say(messages.ModelReport(numbers[0], "another was handed over in its place"))
    assert await one == "another was handed over in its place"


EVENT = AuditEvent(kind="infer", time_us=1, outcome="ok")


async def _ended(gateway, births):
    """The gateway is ended, and a new one is started."""
    async with asyncio.timeout(10):
        await gateway.ended.wait()
        await births.born.get()


async def test_records_are_acknowledged_when_they_count(plane):
    """Each event's own number comes back when its record is durable, with the words of its failure when it is not."""
    _, births = plane
    gateway = await births.born.get()
    for number in (1, 2, 3):
        gateway.say_bytes(messages.append_frame(number, EVENT))
    async with asyncio.timeout(10):
        while len(births.hooks.pending) < 3:  # noqa: ASYNC110 -- a list that a callback fills
            await asyncio.sleep(0.01)
    first, second, third = births.hooks.pending
    second.set_result(None)
    assert await gateway.acknowledged.get() == (2, b"")
    first.set_exception(AuditError("disk full"))
    assert await gateway.acknowledged.get() == (1, b"disk full")
    third.cancel()
    assert await gateway.acknowledged.get() == (3, b"the log was closed")
    assert births.hooks.recorded == [EVENT] * 3


async def test_a_record_that_is_refused_at_once_is_answered(plane):
    """An event that the log does not take is answered, and the gateway lives on."""
    _, births = plane
    gateway = await births.born.get()
    births.hooks.refusal = AuditError("nothing can be written")
    gateway.say_bytes(messages.append_frame(9, EVENT))
    assert await gateway.acknowledged.get() == (9, b"nothing can be written")
    assert not gateway.ended.is_set()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"no message",
        b'{"type":"serve"}',
        b'{"type":"fatal","error":"\xff"}',
        b"A",
        b"A" + bytes(8) + b"{}",
        b"A" + bytes(8) + b'{"kind":"infer","time_us":1,"outcome":"ok","detail":{"a":' + b"[" * 20_000,
        b"A" + bytes(8) + b'{"kind":"infer","time_us":1,"outcome":"ok","principal":"\xff"}',
        messages.append_frame(1, AuditEvent(kind="policy.activate", time_us=1, outcome="ok")),
        messages.append_frame(1, AuditEvent(kind="model.load", time_us=1, outcome="ok")),
        messages.acknowledge_frame(1),
    ],
)
async def test_a_gateway_that_breaks_the_protocol_is_ended(plane, frame):
    """Bytes that are no message, a message of the agent's own, or a record of a kind that is not a gateway's: it is replaced."""
    _, births = plane
    gateway = await births.born.get()
    gateway.say_bytes(frame)
    await _ended(gateway, births)
    assert births.hooks.recorded == []


def _descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_descriptors_of_a_gateway_are_not_kept(plane):
    """Whatever a gateway sends along is closed: it can't fill the agent's table of descriptors."""
    _, births = plane
    gateway = await births.born.get()
    before = _descriptors()
    for _ in range(50):
        gateway.say_bytes(messages.encode(messages.Ready()), (0, 0, 0))
    async with asyncio.timeout(10):
        while len(births.hooks.facts) < 50:  # noqa: ASYNC110 -- a list that a callback fills
            await asyncio.sleep(0.01)
    assert _descriptors() <= before


async def test_a_drain_waits_for_the_gateway_of_the_day(plane):
    """A gateway that was replaced before is no reason to hurry: the drain ends when the living one has no work left."""
    dataplane, births = plane
    first = await births.born.get()
    first.die()
    second = await births.born.get()
    async with asyncio.timeout(10):
        while messages.Serve() not in second.others:  # noqa: ASYNC110 -- a list that a callback fills
            await asyncio.sleep(0.01)
    draining = asyncio.create_task(dataplane.drain(20))
    async with asyncio.timeout(10):
        while messages.Drain(20_000) not in second.others:  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.01)
    assert not draining.done()
    second.say(messages.Drained())
    await draining


async def test_a_drain_ends_with_its_gateway(plane):
    """A gateway that dies in its drain is not waited for, and has no successor."""
    dataplane, births = plane
    gateway = await births.born.get()
    draining = asyncio.create_task(dataplane.drain(20))
    await asyncio.sleep(0)
    gateway.die()
    async with asyncio.timeout(10):
        await draining
    assert births.born.empty()


async def test_policy_data_and_facts_reach_each_gateway(plane):
    """What was set before a gateway began, and what is set later, it is told; a new one gets the newest."""
    dataplane, births = plane
    first = await births.born.get()
    dataplane.set_facts(messages.NodeFacts(trust="affirming"))
    dataplane.set_policy_data("a" * 64, seal_bytes("policy-data", b"{}"))
    dataplane.set_policy_data("b" * 64, seal_bytes("policy-data", b"{}"))
    async with asyncio.timeout(10):
        while messages.PolicyData("b" * 64) not in first.others:  # noqa: ASYNC110 -- a list that a callback fills
            await asyncio.sleep(0.01)
    first.die()
    second = await births.born.get()
    async with asyncio.timeout(10):
        while messages.Serve() not in second.others:  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.01)
    assert messages.PolicyData("a" * 64) not in second.others
    assert second.others[:2] == [messages.PolicyData("b" * 64), messages.NodeFacts(trust="affirming")]
