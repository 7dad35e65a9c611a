"""The asker's side of the policy channel: a decision for a document, always, within a time.

Rules:

1. :meth:`PolicyClient.decide` never raises and never takes longer than the total deadline: no worker, no answer, a late, malformed or
   undefined one is a deny whose ``error`` says why.
2. Questions of one turn of the loop go to the worker in one message: its wake-up is what costs.
3. The deadline of an evaluation counts from its own start, which the worker stamps, and holds again on receipt. At an
   overrun only the culprit is denied: the owner kills the worker, and the other questions go to the spare.
4. When a worker dies (stack, memory), the question that it was evaluating is denied, and the others go to the spare.
5. A worker that nothing is heard of for the total deadline is given up too.
6. With a worker of another policy the old one gets no more questions; what was asked of it is still its to answer. Each answer
   names the policy that gave it.
7. A question that is like an earlier one (:mod:`agent.policy.question`) gets the earlier decision, under an id of its own, as long as
   there is a worker of the policy that decided.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import msgspec
import orjson

from agent.errors import IsolationError
from agent.isolation.channel import AsyncChannel, Frame
from agent.policy.messages import MAX_QUESTION_BYTES, Endpoint, Stamp, pack_question, unpack_answer
from agent.policy.question import Key, Memory, Question
from agent.records import DENY_ALL, Decision, PolicyAnswer

__all__ = ["DEADLINE_S", "TOTAL_DEADLINE_S", "PolicyClient"]

DEADLINE_S = 0.05
TOTAL_DEADLINE_S = 0.25
_NS = 1_000_000_000
_ID_BYTES = 16
_ID_BATCH = 64
_DECISION = msgspec.json.Decoder(Decision)
_Place: TypeAlias = tuple[Memory, Key] | None


class _Asked:
    """One question from ``decide`` to its answer; ``place`` is where the decision is remembered, if at all."""

    __slots__ = ("asked_ns", "decision_id", "future", "input_json", "line", "number", "place", "sent_ns")

    def __init__(
        self, number: int, decision_id: str, input_json: bytes, future: asyncio.Future[PolicyAnswer], place: _Place
    ) -> None:
        self.number = number
        self.decision_id = decision_id
        self.place = place
        self.input_json = input_json
        self.future = future
        self.asked_ns = time.monotonic_ns()
        self.sent_ns = 0
        self.line: _Line | None = None


class _Line:
    """One worker and what it was asked."""

    __slots__ = ("channel", "endpoint", "heard_ns", "open", "stamp")

    def __init__(
        self, endpoint: Endpoint, on_frame: Callable[[_Line, Frame], None], on_close: Callable[[_Line], None]
    ) -> None:
        self.endpoint = endpoint
        self.stamp = Stamp(endpoint.stamp_fd, write=False)
        self.open: dict[int, _Asked] = {}
        self.heard_ns = 0
        self.channel = AsyncChannel(endpoint.sock, lambda frame: on_frame(self, frame), lambda: on_close(self))
        os.close(endpoint.stamp_fd)


class PolicyClient:
    """Asks policy workers; needs a running event loop.

    Args:
        on_overrun: told the number of a worker that must be killed.
        deadline_s: longest time of one evaluation.
        total_deadline_s: longest time of one answer, waiting included.
        remember: whether decisions are remembered where the policy allows it.

    Attributes:
        remembered: how many answers came from memory.
    """

    def __init__(
        self,
        on_overrun: Callable[[int], None],
        *,
        deadline_s: float = DEADLINE_S,
        total_deadline_s: float = TOTAL_DEADLINE_S,
        remember: bool = True,
    ) -> None:
        self._on_overrun = on_overrun
        self._deadline_ns = int(deadline_s * _NS)
        self._total_ns = int(total_deadline_s * _NS)
        self._longest_sleep_ns = min(self._deadline_ns, self._total_ns)
        self._loop = asyncio.get_running_loop()
        self._lines: list[_Line] = []  # of the policy in force; the first is in use, the others are spare
        self._draining: list[_Line] = []
        self._open: dict[int, _Asked] = {}  # in the order in which they were asked
        self._numbers = itertools.count(1)
        self._ids = _decision_ids()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._remember = remember
        self._memory: Memory | None = None  # of the policy in force
        self.remembered = 0

    @property
    def workers(self) -> int:
        """How many workers of the policy in force are at hand."""
        return len(self._lines)

    @property
    def policy_sha256(self) -> str | None:
        """Digest of the policy that the next question will be asked of; None without a worker."""
        return self._lines[0].endpoint.policy_sha256 if self._lines else None

    def attach(self, endpoint: Endpoint) -> None:
        """Take a worker: as spare, or, with a policy other than the one in force, in place of the old ones.

        Raises:
            IsolationError: its shared memory is not what it must be; the endpoint is closed.
        """
        try:
            line = _Line(endpoint, self._on_frame, self._on_gone)
        except IsolationError:
            endpoint.close()
            raise
        if not self._lines or self._lines[0].endpoint.policy_sha256 != endpoint.policy_sha256:
            reads = endpoint.request_reads if self._remember else None
            self._memory = None if reads is None else Memory(reads)
            self._draining += self._lines
            self._lines = []
            for old in list(self._draining):
                self._close_drained(old)
        self._lines.append(line)
        for question in [question for question in self._open.values() if question.line is None]:
            self._send(question)

    def recall(self, question: Question) -> PolicyAnswer | None:
        """Return the decision on an earlier question like this one, under an id of its own; None where there is none."""
        if self._memory is None or not self._lines:
            return None
        known = self._memory.get(question)
        if known is None:
            return None
        self.remembered += 1
        endpoint = self._lines[0].endpoint
        return PolicyAnswer(known, next(self._ids), endpoint.policy_sha256, endpoint.revision)

    async def decide(self, document: Mapping[str, Any] | Question) -> PolicyAnswer:
        """Ask a worker for the decision on one input document (contract §4); remember the one on a :class:`Question`.

        Returns:
            The decision; a deny with ``error`` when there is none.
        """
        decision_id = next(self._ids)
        place: _Place = None
        try:
            if isinstance(document, Question):
                if self._memory is not None:
                    place = self._memory, self._memory.key(document)
                input_json = document.encode()
            else:
                input_json = orjson.dumps(document)
        except TypeError as error:
            return _denied(decision_id, f"the input has no JSON form: {error}")
        return await self._ask(decision_id, input_json, place)

    async def _ask(self, decision_id: str, input_json: bytes, place: _Place) -> PolicyAnswer:
        if len(input_json) > MAX_QUESTION_BYTES:
            return _denied(decision_id, f"the input has {len(input_json)} bytes, over {MAX_QUESTION_BYTES}")
        if self._closed:
            return _denied(decision_id, "the policy client is closed")
        question = _Asked(next(self._numbers), decision_id, input_json, self._loop.create_future(), place)
        self._open[question.number] = question
        self._send(question)
        if self._timer is None:
            self._timer = self._loop.call_later(self._longest_sleep_ns / _NS, self._tick)
        return await question.future

    def close(self) -> None:
        """Give all workers up; what is open is denied."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for question in list(self._open.values()):
            self._deny(question, "the policy client is closed")
        for line in [*self._lines, *self._draining]:
            self._drop(line)

    def _send(self, question: _Asked) -> None:
        """Ask the worker in use, or leave the question waiting for the next worker."""
        while self._lines:
            line = self._lines[0]
            try:
                line.channel.send(pack_question(question.number, question.input_json))
            except IsolationError:
                self._on_gone(line)
                continue
            question.line = line
            question.sent_ns = time.monotonic_ns()
            line.open[question.number] = question
            return
        question.line = None

    def _on_frame(self, line: _Line, frame: Frame) -> None:
        frame.close_fds()
        now = line.heard_ns = time.monotonic_ns()
        try:
            answer = unpack_answer(frame.data)
        except IsolationError:
            self._give_up(line)
            return
        question = line.open.pop(answer.question, None)
        if question is None:
            return  # denied meanwhile, for the total deadline
        if answer.eval_us * 1000 > self._deadline_ns or now - question.asked_ns > self._total_ns:
            self._deny(question, f"late: the evaluation took {answer.eval_us} µs", line, answer.eval_us)
        elif answer.value is None:
            self._deny(question, answer.error or "the engine failed", line, answer.eval_us)
        else:
            self._judge(question, line, answer.value, answer.eval_us)
        self._close_drained(line)

    def _judge(self, question: _Asked, line: _Line, value: bytes, eval_us: int) -> None:
        try:
            decision = _DECISION.decode(value)
        except ValueError as error:
            self._deny(question, f"the decision is malformed: {error}", line, eval_us)
            return
        endpoint = line.endpoint
        # A question may outlive the policy that was in force when it was asked; its key is of that policy's memory alone.
        if question.place is not None and question.place[0] is self._memory:
            self._memory.put(question.place[1], decision)
        self._resolve(
            question,
            PolicyAnswer(decision, question.decision_id, endpoint.policy_sha256, endpoint.revision, eval_us=eval_us),
        )

    def _deny(self, question: _Asked, reason: str, line: _Line | None = None, eval_us: int = 0) -> None:
        if line is None:
            line = question.line
        self._resolve(question, _denied(question.decision_id, reason, line, eval_us))

    def _resolve(self, question: _Asked, answer: PolicyAnswer) -> None:
        del self._open[question.number]
        if not question.future.done():  # the caller may have been cancelled
            question.future.set_result(answer)

    def _tick(self) -> None:
        """Look for overruns and expired questions; run again when the next one can be.

        An evaluation that starts after this moment cannot overrun before one deadline from now, so that is the longest sleep.
        """
        now = time.monotonic_ns()
        self._timer = None
        wakes = []
        for line in [*self._lines, *self._draining]:
            running = None if line.channel.closed else line.stamp.running()
            if running is None or running[1] > now:
                continue
            if (over := running[1] + self._deadline_ns) > now:
                wakes.append(over)
                continue
            if (culprit := line.open.pop(running[0], None)) is not None:
                self._deny(culprit, f"the evaluation took over {self._deadline_ns // 1000} µs", line)
            self._give_up(line)
        self._expire(now)
        if self._open:
            wakes += [now + self._longest_sleep_ns, next(iter(self._open.values())).asked_ns + self._total_ns]
        if wakes:
            delay = max(min(wakes) - time.monotonic_ns(), 0) / _NS
            self._timer = self._loop.call_later(delay, self._tick)

    def _expire(self, now: int) -> None:
        for question in list(
            itertools.takewhile(lambda old: now - old.asked_ns >= self._total_ns, self._open.values())
        ):
            line = question.line
            if line is not None:
                line.open.pop(question.number, None)
            self._deny(question, f"no answer within {self._total_ns // 1000} µs", line)
            if line is not None and line.heard_ns < question.sent_ns and now - question.sent_ns >= self._total_ns:
                self._give_up(line)

    def _give_up(self, line: _Line) -> None:
        """Have a worker killed, and ask its other questions elsewhere."""
        self._drop(line)
        self._on_overrun(line.endpoint.number)
        self._resend(line)

    def _on_gone(self, line: _Line) -> None:
        """Deny what a dead worker was evaluating; ask the rest elsewhere."""
        running = line.stamp.running() if line in self._lines or line in self._draining else None
        if not self._drop(line):
            return
        if running is not None and (culprit := line.open.pop(running[0], None)) is not None:
            self._deny(culprit, "the worker died while it evaluated this", line)
        self._resend(line)

    def _resend(self, line: _Line) -> None:
        for question in line.open.values():
            self._send(question)
        line.open = {}

    def _drop(self, line: _Line) -> bool:
        """Forget a worker; False when it had been forgotten."""
        for lines in (self._lines, self._draining):
            if line in lines:
                lines.remove(line)
                line.channel.close()
                line.stamp.close()
                return True
        return False

    def _close_drained(self, line: _Line) -> None:
        if line in self._draining and not line.open:
            self._drop(line)


def _denied(decision_id: str, reason: str, line: _Line | None = None, eval_us: int = 0) -> PolicyAnswer:
    sha256, revision = (line.endpoint.policy_sha256, line.endpoint.revision) if line is not None else ("", "")
    return PolicyAnswer(DENY_ALL, decision_id, sha256, revision, error=reason, eval_us=eval_us)


def _decision_ids() -> Iterator[str]:
    """Yield 128-bit random ids; one system call gives a batch of them."""
    while True:
        batch = os.urandom(_ID_BYTES * _ID_BATCH).hex()
        for start in range(0, len(batch), 2 * _ID_BYTES):
            yield batch[start : start + 2 * _ID_BYTES]
