"""Both engines, asked the same questions, decide the same: on the shipped data and on data that uses every option."""

import json
from collections import Counter

import pytest

from agent.records import Decision, decode
from bench.realistic_policy import realistic_data, realistic_input, write
from tests.support.policy_inputs import generate, near_misses
from tests.support.rego import POLICIES, Embedded, opa_server, policy_data

SEED = 20260303
COUNT = 1000

IMPOSSIBLE_DATE = "2026-02-30T09:30:00Z"
"""Well formed, and an error to the engines' time functions: the only one that an input can cause."""

KNOWN_REASONS = {
    *("action_unknown", "subject_unknown", "subject_suspended", "model_not_granted", "sensitivity_not_granted"),
    *("role_may_not_infer", "role_may_not_read_metadata", "role_may_not_load", "role_may_not_unload"),
    *("role_may_not_export", "role_may_not_open", "role_may_not_administer", "outside_time_window", "mfa_required"),
    *("model_unknown", "model_not_measured", "signer_not_trusted", "digest_not_allowed", "node_contraindicated"),
    *("node_not_trusted", "attestation_too_old", "source_not_allowed", "limit_undefined", "request_too_large"),
    *("batch_too_large", "budget_exhausted", "input_anomalous", "profile_undefined"),
}


@pytest.fixture(scope="module", params=["shipped", "realistic"])
def policies(request, tmp_path_factory):
    """A policies folder."""
    if request.param == "shipped":
        return POLICIES
    folder = tmp_path_factory.mktemp("realistic") / "policies"
    write(folder, realistic_data(seed=7))
    return folder


@pytest.fixture(scope="module")
def documents():
    return [*generate(SEED, COUNT), *near_misses(realistic_input())]


@pytest.mark.integration
def test_engines_decide_alike(policies, documents):
    """On every generated input the engines give one and the same decision, or both err."""
    embedded = Embedded.load(policies)
    with opa_server(policies) as server:
        for document in documents:
            assert embedded.decide(document) == server.decide(document), document


def test_decisions_are_well_formed(policies, documents):
    """Each decision decodes strictly; an allowed one has no reason and a denied one has known, sorted reasons."""
    embedded = Embedded.load(policies)
    answers: Counter[bool | None] = Counter()
    for document in documents:
        answer = embedded.decide(document)
        if answer is None:
            assert document["request"]["time"] == IMPOSSIBLE_DATE
            continue
        decision = decode(json.dumps(answer).encode(), Decision)
        answers[decision.allow] += 1
        assert decision.allow == (not decision.reasons), document
        assert list(decision.reasons) == sorted(set(decision.reasons))
        assert set(decision.reasons) <= KNOWN_REASONS
    assert min(answers[True], answers[False]) > COUNT / 20, "the inputs do not reach both answers"


def members(document, path=()):
    """Paths of all members, the deepest included."""
    for key, value in document.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from members(value, (*path, key))


def without(document, path):
    """A copy in which one member is absent."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return copy


def allows(embedded, document):
    """Whether the document is allowed; an error is a denial."""
    answer = embedded.decide(document)
    return answer is not None and answer["allow"]


def test_taking_a_member_away_never_allows(policies, documents):
    """A denied input stays denied when any one of its members is absent.

    The one exception is by design: metadata without a resource is the server's own, which names no model.
    """
    embedded = Embedded.load(policies)
    tried = 0
    for document in documents[:150]:
        if allows(embedded, document):
            continue
        for path in members(document):
            if document.get("action") == "metadata" and path == ("resource",):
                continue
            tried += 1
            assert not allows(embedded, without(document, path)), (path, document)
    assert tried > 500


@pytest.mark.integration
@pytest.mark.parametrize("area", sorted(policy_data()))
def test_without_an_area_of_data_nothing_more_is_inferred(area, tmp_path, documents):
    """With one area of data empty the engines still agree, and allow no inference that they denied before."""
    complete = Embedded.load()
    write(tmp_path / "policies", policy_data() | {area: {}})
    partial = Embedded.load(tmp_path / "policies")
    inferences = [document for document in documents if document.get("action") == "infer"][:200]
    with opa_server(tmp_path / "policies") as server:
        for document in inferences:
            assert partial.decide(document) == server.decide(document), document
            assert allows(complete, document) or not allows(partial, document), document


@pytest.mark.integration
def test_an_error_is_an_error_in_both(tmp_path):
    """A malformed network in the data fails each decision that reads it, in both engines: a denial, not a gap."""
    network = {"default": {"allow": ["10.0.0.0/8", "nonsense"], "deny": []}, "actions": {}}
    write(tmp_path / "policies", policy_data() | {"network": network})
    document = {"action": "metadata", "subject": {"id": "a", "kind": "mtls", "roles": ["operator"]}}
    document["request"] = {"source_ip": "8.8.8.8"}
    assert Embedded.load(tmp_path / "policies").decide(document) is None
    with opa_server(tmp_path / "policies") as server:
        assert server.decide(document) is None


def test_the_same_seed_gives_the_same_inputs():
    """Inputs can be made again from their seed."""
    assert list(generate(1, 50)) == list(generate(1, 50))
    assert list(generate(1, 50)) != list(generate(2, 50))
