"""The asker's side, against a real worker's loop: always an answer, and the right one to blame."""

import asyncio
import contextlib

import pytest

from agent.errors import IsolationError
from agent.isolation.channel import MAX_QUEUED_FRAMES, Channel, channel_pair
from agent.policy.client import PolicyClient
from agent.policy.messages import MAX_QUESTION_BYTES, Answer, Endpoint, pack_answer, stamp_memory
from agent.policy.question import Question
from agent.records import DENY_ALL, PolicyAnswer
from tests.support.policy import Script, WorkerThread, until

DEADLINE_S, TOTAL_S = 0.3, 3.0


@contextlib.asynccontextmanager
async def asking(
    *workers: WorkerThread, deadline_s: float = DEADLINE_S, total_s: float = TOTAL_S, remember: bool = True
):
    """A client with these workers; killing one closes its socket."""
    known = {worker.number: worker for worker in workers}
    killed: list[int] = []

    def kill(number: int) -> None:
        killed.append(number)
        known[number].engine.release.set()

    client = PolicyClient(kill, deadline_s=deadline_s, total_deadline_s=total_s, remember=remember)
    for worker in workers:
        client.attach(worker.start())
    try:
        yield client, killed
    finally:
        client.close()
        for worker in workers:
            await asyncio.to_thread(worker.join)


async def test_an_answer_carries_the_decision_and_who_made_it() -> None:
    """Decision, policy, revision and a fresh id come back; the document went as it is."""
    worker = WorkerThread()
    async with asking(worker) as (client, _):
        first = await client.decide({"answer": {"allow": True, "reasons": ["a"]}, "n": 1.5})
        second = await client.decide({"answer": {"allow": False}})
    assert first.decision.allow
    assert first.decision.reasons == ("a",)
    assert not second.decision.allow
    assert (first.policy_sha256, first.revision, first.error) == ("a" * 64, "r1", None)
    assert len(first.decision_id) == len(second.decision_id) == 32
    assert first.decision_id != second.decision_id
    assert worker.engine.seen[0] == {"answer": {"allow": True, "reasons": ["a"]}, "n": 1.5}


async def test_ids_do_not_repeat() -> None:
    """More ids than one batch holds are all different."""
    async with asking(WorkerThread()) as (client, _):
        answers = await asyncio.gather(*(client.decide({}) for _ in range(300)))
    assert len({answer.decision_id for answer in answers}) == 300
    assert all(answer.decision.allow for answer in answers)


async def test_questions_of_one_turn_travel_together() -> None:
    """Eight questions asked in one turn reach the worker in one message."""
    ours, theirs = channel_pair()
    client = PolicyClient(lambda _: None, deadline_s=DEADLINE_S, total_deadline_s=TOTAL_S)
    client.attach(Endpoint(1, ours, stamp_memory(), "a" * 64, "r1"))
    tasks = [asyncio.ensure_future(client.decide({"n": n})) for n in range(8)]
    await asyncio.sleep(0.01)
    message = theirs.recv(65536)
    assert all(b'{"n":%d}' % n in message for n in range(8))
    client.close()
    assert all(answer.error for answer in await asyncio.gather(*tasks))
    theirs.close()


@pytest.mark.parametrize(
    "answer",
    [{}, {"allow": "yes"}, {"allow": 1}, {"allow": True, "more": 1}, [], None, True, {"allow": True, "reasons": "x"},
     {"allow": True, "reasons": [1]}, {"allow": True, "obligations": {"fly": True}}, {"allow": True, "obligations": []}],
)  # fmt: skip
async def test_a_decision_of_another_shape_is_a_deny(answer) -> None:
    """Only the contract's decision allows."""
    async with asking(WorkerThread()) as (client, _):
        got = await client.decide({"answer": answer})
    assert got.decision == DENY_ALL
    assert "malformed" in (got.error or "")


async def test_an_engines_error_is_a_deny_with_its_words() -> None:
    """The cause stands in the answer for the decision log."""
    async with asking(WorkerThread()) as (client, _):
        got = await client.decide({"do": "fail"})
    assert got.decision == DENY_ALL
    assert got.error == "it failed"
    assert got.policy_sha256 == "a" * 64


@pytest.mark.parametrize("document", [{"x": object()}, {1: 2}, {"x": "a" * (MAX_QUESTION_BYTES + 1)}, {"x": "\ud800"}])
async def test_a_document_that_cannot_be_asked_is_a_deny(document) -> None:
    """No form, or too large: denied at once, without a worker."""
    async with asking() as (client, _):
        got = await client.decide(document)
    assert got.decision == DENY_ALL
    assert "input" in (got.error or "")


async def test_a_recursive_document_is_a_deny() -> None:
    """A document without an end does not raise."""
    document: dict[str, object] = {}
    document["x"] = document
    async with asking() as (client, _):
        assert (await client.decide(document)).error


async def test_without_a_worker_the_answer_is_a_deny_in_time() -> None:
    """Nobody to ask is a deny, after the total deadline."""
    async with asking(total_s=0.05) as (client, killed):
        got = await client.decide({})
    assert (got.decision, got.policy_sha256) == (DENY_ALL, "")
    assert "no answer" in (got.error or "")
    assert killed == []


async def test_a_question_waits_for_a_worker() -> None:
    """A worker that comes in time answers what was asked before it came."""
    worker = WorkerThread()
    async with asking() as (client, _):
        assert (client.workers, client.policy_sha256) == (0, None)
        asked = asyncio.ensure_future(client.decide({}))
        await asyncio.sleep(0.01)
        client.attach(worker.start())
        assert (await asked).decision.allow
        assert (client.workers, client.policy_sha256) == (1, "a" * 64)
    await asyncio.to_thread(worker.join)


async def test_an_overrun_costs_its_question_only() -> None:
    """The one that hangs is denied and its worker killed; all that waited behind it are answered by the spare."""
    first, spare = WorkerThread(), WorkerThread()
    async with asking(first, spare) as (client, killed):
        answers = await asyncio.gather(client.decide({"do": "hang"}), *(client.decide({"n": n}) for n in range(8)))
        assert client.workers == 1
    assert "took over" in (answers[0].error or "")
    assert [answer.error for answer in answers[1:]] == [None] * 8
    assert killed == [first.number]
    assert {"do": "hang"} not in spare.engine.seen


async def test_a_death_costs_the_question_that_was_evaluated() -> None:
    """A worker that dies takes one question with it; the others go to the spare."""
    first, spare = WorkerThread(), WorkerThread()
    async with asking(first, spare) as (client, killed):
        answers = await asyncio.gather(
            client.decide({"n": 0}), client.decide({"do": "die"}), *(client.decide({"n": n}) for n in range(1, 8))
        )
    assert "died" in (answers[1].error or "")
    assert [answer.error for number, answer in enumerate(answers) if number != 1] == [None] * 8
    assert killed == []


async def test_without_a_spare_the_others_wait_for_one() -> None:
    """After the only worker died the rest is asked again when the next comes."""
    first, late = WorkerThread(), WorkerThread()
    async with asking(first) as (client, _):
        asked = asyncio.gather(client.decide({"do": "die"}), client.decide({}))
        await until(lambda: not client.workers)
        client.attach(late.start())
        died, answered = await asked
    assert died.error
    assert answered.error is None
    await asyncio.to_thread(late.join)


async def test_a_late_answer_is_a_deny() -> None:
    """An evaluation over the deadline is denied on receipt, whatever it decided."""
    async with asking() as (client, _):
        ours, theirs = channel_pair()
        client.attach(Endpoint(1, ours, stamp_memory(), "a" * 64, "r1"))
        asked = asyncio.ensure_future(client.decide({}))
        await asyncio.sleep(0.01)
        number = int.from_bytes(theirs.recv(65536)[4:12], "little")
        frame = pack_answer(Answer(number, int(DEADLINE_S * 2e6), value=b'{"allow":true}'))
        theirs.send(len(frame).to_bytes(4, "little") + frame)
        got = await asked
        theirs.close()
    assert got.decision == DENY_ALL
    assert "late" in (got.error or "")


async def test_a_silent_worker_is_given_up() -> None:
    """A worker that takes questions and evaluates nothing is killed after the total deadline."""
    known: list[int] = []
    client = PolicyClient(known.append, deadline_s=0.02, total_deadline_s=0.05)
    ours, theirs = channel_pair()
    client.attach(Endpoint(5, ours, stamp_memory(), "a" * 64, "r1"))
    got = await client.decide({})
    assert "no answer" in (got.error or "")
    assert known == [5]
    assert client.workers == 0
    client.close()
    theirs.close()


async def test_an_evaluation_whose_question_is_gone_is_still_stopped() -> None:
    """A question that expired while it was evaluated leaves no worker spinning behind."""
    worker = WorkerThread()
    async with asking(worker, deadline_s=0.4, total_s=0.2) as (client, killed):
        got = await client.decide({"do": "hang"})
        assert "no answer" in (got.error or "")
        await until(lambda: killed)
    assert killed == [worker.number]


async def test_an_evaluation_that_outlives_its_question_is_stopped_though_its_worker_was_heard() -> None:
    """A sign of life between question and expiry does not save a worker whose evaluation overruns later."""
    worker = WorkerThread()
    async with asking(worker, deadline_s=0.8, total_s=0.4) as (client, killed):
        first = asyncio.ensure_future(client.decide({"do": "pause"}))
        await until(lambda: worker.engine.seen)
        second = asyncio.ensure_future(client.decide({"do": "hang"}))
        await asyncio.sleep(0.01)
        worker.engine.resume.set()
        assert (await first).error is None
        assert "no answer" in ((await second).error or "")
        assert killed == []
        await until(lambda: killed)


async def test_nonsense_twice_in_a_message_kills_once() -> None:
    """The rest of a message of a worker that was given up is ignored."""
    known: list[int] = []
    client = PolicyClient(known.append, deadline_s=0.1, total_deadline_s=0.2)
    ours, theirs = channel_pair()
    client.attach(Endpoint(5, ours, stamp_memory(), "a" * 64, "r1"))
    Channel(theirs).send_many([b"x", b"y"])
    await until(lambda: known)
    assert known == [5]
    client.close()
    theirs.close()


@pytest.mark.parametrize("frame", [b"", b"short"])
async def test_a_worker_that_talks_nonsense_is_killed(frame) -> None:
    """A malformed answer gives the worker up; the question goes to the spare."""
    spare, known = WorkerThread(), list[int]()
    client = PolicyClient(known.append, deadline_s=DEADLINE_S, total_deadline_s=TOTAL_S)
    ours, theirs = channel_pair()
    client.attach(Endpoint(5, ours, stamp_memory(), "a" * 64, "r1"))
    client.attach(spare.start())
    asked = asyncio.ensure_future(client.decide({}))
    await asyncio.sleep(0.01)
    theirs.send(len(frame).to_bytes(4, "little") + frame)
    assert (await asked).error is None
    assert known == [5]
    client.close()
    theirs.close()
    await asyncio.to_thread(spare.join)


async def test_answers_that_nobody_asked_for_are_ignored() -> None:
    """A worker cannot answer for another question."""
    worker = WorkerThread()
    async with asking(worker) as (client, killed):
        worker.send_raw(pack_answer(Answer(2**40, 0, value=b'{"allow":true}')))
        assert (await client.decide({"answer": {"allow": False}})).decision == DENY_ALL
    assert killed == []


async def test_a_stamp_from_the_future_blames_nobody() -> None:
    """A worker that lies about its start neither blames another question nor escapes the total deadline."""
    known: list[int] = []
    client = PolicyClient(known.append, deadline_s=0.02, total_deadline_s=0.1)
    ours, theirs = channel_pair()
    liar = WorkerThread()
    client.attach(Endpoint(5, ours, stamp_memory(), "a" * 64, "r1"))
    line = client._lines[0]
    line.stamp.close()
    line.stamp = liar.stamp
    liar.stamp.begin(1, 2**62)
    assert "no answer" in ((await client.decide({})).error or "")
    assert known == [5]
    client.close()
    theirs.close()
    liar.join()
    liar.endpoint.close()


async def test_a_new_policy_takes_over_without_losing_what_was_asked() -> None:
    """What the old worker was asked it answers, under its own digest; the next question goes to the new policy."""
    old, new = WorkerThread(), WorkerThread(sha256="b" * 64, revision="r2")
    async with asking(old) as (client, _):
        asked = asyncio.ensure_future(client.decide({}))
        await asyncio.sleep(0)
        client.attach(new.start())
        assert client.policy_sha256 == "b" * 64
        assert (await client.decide({})).revision == "r2"
        assert (await asked).revision == "r1"
        assert client._draining == []
    await asyncio.to_thread(new.join)


async def test_an_idle_old_worker_is_let_go_at_once() -> None:
    """With nothing in flight the old worker's socket closes when the new one comes."""
    old, new = WorkerThread(), WorkerThread(sha256="b" * 64)
    async with asking(old) as (client, _):
        client.attach(new.start())
        await asyncio.to_thread(old._thread.join, 10)
        assert not old._thread.is_alive()
    await asyncio.to_thread(new.join)


async def test_an_old_worker_that_hangs_is_killed_and_its_rest_resent() -> None:
    """Draining does not suspend the deadline."""
    old, new = WorkerThread(), WorkerThread(sha256="b" * 64, revision="r2")
    async with asking(old) as (client, killed):
        asked = asyncio.gather(client.decide({"do": "hang"}), client.decide({}))
        await asyncio.sleep(0.01)
        client.attach(new.start())
        hung, other = await asked
    assert "took over" in (hung.error or "")
    assert (other.error, other.revision) == (None, "r2")
    assert killed == [old.number]
    await asyncio.to_thread(new.join)


async def test_a_cancelled_asker_disturbs_nobody() -> None:
    """An answer for a caller that is gone is dropped."""
    worker = WorkerThread()
    async with asking(worker) as (client, _):
        asked = asyncio.ensure_future(client.decide({}))
        await asyncio.sleep(0)
        asked.cancel()
        assert (await client.decide({})).error is None
        assert client._open == {}


async def test_a_closed_client_denies() -> None:
    """After the end, and at the end, the answer is a deny."""
    worker = WorkerThread()
    async with asking(worker) as (client, _):
        asked = asyncio.ensure_future(client.decide({"do": "hang"}))
        await asyncio.sleep(0.01)
        client.close()
        client.close()
        assert "closed" in ((await asked).error or "")
        assert "closed" in ((await client.decide({})).error or "")
        worker.engine.release.set()


async def test_an_endpoint_with_foreign_memory_is_refused() -> None:
    """An endpoint whose stamp could fault is closed, and the client goes on."""
    async with asking() as (client, _):
        ours, theirs = channel_pair()
        with pytest.raises(IsolationError):
            client.attach(Endpoint(1, ours, theirs.fileno(), "a", "r"))
        theirs.detach()
        assert client.workers == 0


async def test_a_worker_that_does_not_read_is_dropped() -> None:
    """What a full channel, which closes itself, does not take goes to the spare."""
    spare = WorkerThread()
    client = PolicyClient(lambda _: None, deadline_s=DEADLINE_S, total_deadline_s=TOTAL_S)
    ours, theirs = channel_pair()
    client.attach(Endpoint(5, ours, stamp_memory(), "a" * 64, "r1"))
    client.attach(spare.start())
    channel = client._lines[0].channel
    channel._queue.extend([(b"", ())] * MAX_QUEUED_FRAMES)
    assert (await client.decide({})).error is None
    assert channel.closed
    client.close()
    theirs.close()
    await asyncio.to_thread(spare.join)


async def test_a_worker_serves_more_than_one_message_of_answers() -> None:
    """Answers that do not fit one message go in several."""
    async with asking(WorkerThread(Script())) as (client, _):
        answers = await asyncio.gather(*(client.decide({"do": "swell"}) for _ in range(9)))
    assert [len(answer.decision.reasons[0]) for answer in answers] == [20_000] * 9


def _question(**request: object) -> Question:
    return Question(b"{}", "infer", b"", b"{}", request)


async def _decide(client: PolicyClient, question: Question) -> PolicyAnswer:
    """As a gateway does."""
    return client.recall(question) or await client.decide(question)


async def test_a_question_like_an_earlier_one_is_answered_from_memory() -> None:
    """The worker is asked once; every answer has an id of its own."""
    worker = WorkerThread(request_reads=("time",))
    async with asking(worker) as (client, _):
        first = await _decide(client, _question(time="1", rate=1))
        second = await _decide(client, _question(time="1", rate=2))
        third = await _decide(client, _question(time="2", rate=2))
    assert len(worker.engine.seen) == 2
    assert client.remembered == 1
    assert (second.decision, second.policy_sha256, second.revision) == (first.decision, "a" * 64, "r1")
    assert len({first.decision_id, second.decision_id, third.decision_id}) == 3


@pytest.mark.parametrize(("reads", "remember"), [(None, True), (("time",), False)])
async def test_nothing_is_remembered_where_it_must_not_be(reads, remember) -> None:
    """Not of a policy that reads more than can be compared, and not where the operator says no."""
    worker = WorkerThread(request_reads=reads)
    async with asking(worker, remember=remember) as (client, _):
        for _ in range(3):
            assert (await _decide(client, _question(time="1"))).decision.allow
    assert len(worker.engine.seen) == 3


async def test_an_error_is_asked_again() -> None:
    """What the engine failed at, or answered in another shape, is not remembered."""
    worker = WorkerThread(request_reads=("do", "answer"))
    async with asking(worker) as (client, _):
        for request in ({"do": "fail"}, {"answer": {"allow": "yes"}}):
            for _ in range(2):
                assert (await _decide(client, Question(b"{}", "infer", b"", b"{}", request))).error
    assert len(worker.engine.seen) == 4


async def test_a_new_policy_begins_with_an_empty_memory() -> None:
    """What one policy decided says nothing about another."""
    old = WorkerThread(request_reads=("time",))
    new = WorkerThread(sha256="b" * 64, request_reads=("time",))
    async with asking(old) as (client, _):
        await _decide(client, _question(time="1"))
        client.attach(new.start())
        answer = await _decide(client, _question(time="1"))
    new.join()
    assert answer.policy_sha256 == "b" * 64
    assert (len(old.engine.seen), len(new.engine.seen)) == (1, 1)


async def test_an_old_policys_answer_does_not_enter_the_new_memory() -> None:
    """A question that was under way when the policy changed is answered by whom it was asked, and forgotten."""
    old = WorkerThread(request_reads=("time",))
    new = WorkerThread(sha256="b" * 64, request_reads=("time",))
    async with asking(old) as (client, _):
        slow = Question(b"{}", "infer", b"", b"{}", {"time": "1", "do": "pause"})
        asked = asyncio.ensure_future(_decide(client, slow))
        await until(lambda: old.engine.seen)
        client.attach(new.start())
        old.engine.resume.set()
        assert (await asked).policy_sha256 == "a" * 64
        assert (await _decide(client, _question(time="1"))).policy_sha256 == "b" * 64
    new.join()
    assert len(new.engine.seen) == 1


async def test_without_a_worker_nothing_is_answered_from_memory() -> None:
    """A decision needs a living worker of its policy, also one that was made before."""
    worker = WorkerThread(request_reads=("time",))
    async with asking(worker, total_s=0.3) as (client, _):
        assert (await _decide(client, _question(time="1"))).decision.allow
        worker.kill()
        await until(lambda: client.workers == 0)
        assert (await _decide(client, _question(time="1"))).decision == DENY_ALL
