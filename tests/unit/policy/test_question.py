"""A question in parts is the same document, and a memory knows it again by what matters alone."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.policy.question import MAX_REMEMBERED, Memory, Question
from agent.records import Decision

YES, NO = Decision(allow=True), Decision(allow=False)
MEMBERS = st.dictionaries(
    st.sampled_from(["time", "bytes", "rate", "source_ip"]),
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([0.0, 1.0, "", "1"]),
)


def question(request, *, subject=b'{"id":"a"}', action="infer", resource=b"", node=b"{}") -> Question:
    return Question(subject, action, resource, node, request)


def test_the_parts_make_one_document():
    """The document has the contract's members, and a resource only where there is one."""
    parts = question({"bytes": 3, "time": "2026"}, action='od"d', resource=b'{"model":"m"}')
    assert json.loads(parts.encode()) == {
        "subject": {"id": "a"},
        "action": 'od"d',
        "resource": {"model": "m"},
        "request": {"bytes": 3, "time": "2026"},
        "node": {},
    }
    assert "resource" not in json.loads(question({}).encode())


def test_what_can_not_be_read_does_not_count():
    """Two questions that differ in what the policy can't read have one key."""
    memory = Memory(["time"])
    assert memory.key(question({"time": "1", "rate": 1})) == memory.key(question({"time": "1", "rate": {"1s": 2}}))


@pytest.mark.parametrize(
    "other",
    [
        question({"time": "2"}),
        question({}),
        question({"time": None}),
        question({"time": 1}),
        question({"time": "1"}, subject=b'{"id":"b"}'),
        question({"time": "1"}, action="export"),
        question({"time": "1"}, resource=b'{"model":"m"}'),
        question({"time": "1"}, node=b'{"trust":"none"}'),
    ],
)
def test_whatever_else_differs_counts(other):
    """A member that can be read, absent or of another type, subject, action, resource or node: another key."""
    memory = Memory(["time"])
    memory.put(memory.key(question({"time": "1"})), YES)
    assert memory.get(other) is None
    assert memory.get(question({"time": "1"})) is YES


@given(MEMBERS, MEMBERS)
def test_one_key_means_one_projection(first, second):
    """Keys are equal exactly when the JSON of what can be read is: ``1``, ``1.0`` and ``true`` are three things."""
    memory = Memory(["bytes", "time"])
    seen = [json.dumps({name: part[name] for name in ("bytes", "time") if name in part}) for part in (first, second)]
    assert (memory.key(question(first)) == memory.key(question(second))) == (seen[0] == seen[1])


def test_a_memory_is_bounded():
    """The oldest decision makes room for the newest."""
    memory = Memory(["n"])
    questions = [question({"n": n}) for n in range(MAX_REMEMBERED + 1)]
    for each in questions:
        memory.put(memory.key(each), NO)
    assert memory.get(questions[0]) is None
    assert all(memory.get(each) is NO for each in questions[1:])


def test_a_request_without_a_json_form_has_no_key():
    """It is the asker's error, as it would be without a memory."""
    with pytest.raises(TypeError):
        Memory(["time"]).key(question({"time": object()}))
    assert Memory(["time"]).get(question({"time": object()})) is None
