"""A turn of the loop: its order, and that nobody's failure is another's."""

import asyncio

from agent.gateway.turn import Turn


class Party:
    """Stands for a connection in a turn: notes what it is told, in a list that all share."""

    def __init__(self, name, log, turn, *, fails=False):
        self.name, self._log, self._turn, self._fails = name, log, turn, fails

    def answer(self):
        self._log.append(f"answer {self.name}")
        if self._fails:
            raise RuntimeError("a fault of ours")
        self._turn.deliver(self, b"x", last=False)

    def deliver(self, data, *, last):
        self._log.append(f"send {self.name} {data!r} {last}")


async def test_a_turn_answers_all_and_then_sends_all():
    """What is ready together is answered in its order before anything is sent; a later turn begins anew."""
    turn = Turn()
    log: list[str] = []
    for name in "abc":
        turn.ready(Party(name, log, turn))
    assert log == []
    await asyncio.sleep(0)
    assert log == [*(f"answer {name}" for name in "abc"), *(f"send {name} b'x' False" for name in "abc")]
    log.clear()
    late = Party("d", log, turn)
    turn.deliver(late, b"y", last=True)
    assert log == ["send d b'y' True"]


async def test_one_that_fails_takes_no_other_with_it():
    """An error that no handler made reaches the loop; who was answered is sent to, and who was not is answered."""
    turn = Turn()
    log: list[str] = []
    errors: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
    for name in "abc":
        turn.ready(Party(name, log, turn, fails=name == "b"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert log == ["answer a", "answer b", "send a b'x' False", "answer c", "send c b'x' False"]
    assert [str(error) for error in errors] == ["a fault of ours"]
