"""A gateway that dies while it is given its models: nothing waits for it, and the next one gets the right files."""

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent import messages
from agent.flows.dataplane import Dataplane, ServedModel
from agent.isolation.channel import AsyncChannel, Frame, channel_pair
from agent.isolation.memfd import seal_bytes
from agent.isolation.process import ExitStatus
from agent.isolation.sandbox import Limits, Profile
from agent.isolation.supervisor import ChildSpec


class Gateway:
    """The other end of a data plane's channel, in this process; stands for the sandboxed child that the zygote forks."""

    def __init__(self) -> None:
        self.sock, theirs = channel_pair()
        self.pid = 1
        self.ended = asyncio.Event()
        self.loads: asyncio.Queue[tuple[messages.LoadModel, list[bytes]]] = asyncio.Queue()
        self.others: list[Any] = []
        self._channel = AsyncChannel(theirs, self._frame, self.ended.set)

    def _frame(self, frame: Frame) -> None:
        message = messages.decode_agent_message(frame.data)
        if isinstance(message, messages.LoadModel):
            self.loads.put_nowait((message, [os.pread(fd, 1000, 0) for fd in frame.fds]))
        else:
            self.others.append(message)
        frame.close_fds()

    def say(self, message: messages.GatewayMessage) -> None:
        self._channel.send(messages.encode(message))

    def die(self) -> None:
        self._channel.close()

    def kill(self, _: int = 9) -> None:
        self._channel.close()

    async def wait(self) -> ExitStatus:
        await self.ended.wait()
        return ExitStatus(signal=9)


class Births:
    """Stands for the zygote."""

    def __init__(self) -> None:
        self.born: asyncio.Queue[Gateway] = asyncio.Queue()

    async def spawn(self, _: ChildSpec) -> Gateway:
        gateway = Gateway()
        self.born.put_nowait(gateway)
        return gateway


class Hooks:
    """Stands for the node."""

    def record(self, _: Any) -> asyncio.Future[Any]:
        raise AssertionError("nothing is recorded here")

    def subscribe(self, _: Callable[..., None]) -> "Hooks":
        return self

    def close(self) -> None: ...

    def serving(self, *, holds: bool, why: str) -> None: ...

    def statistics(self, report: messages.Statistics | None) -> None: ...


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
