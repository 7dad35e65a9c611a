"""The short cut for plain inferences grants nothing that the general rules would not, whatever the data says."""

import json
from typing import Any

import pytest

from bench.realistic_policy import realistic_input
from tests.support.policy_inputs import generate, near_misses
from tests.support.rego import Embedded, policy_data

MODEL = "surface-defects"
NEVER = {"never": {"days": ["Monday"], "from": "00:00", "to": "00:01", "not_after": "2020-01-01T00:00:00Z"}}
GRANT = ("roles", "definitions", "operator", "grants", "infer")

# One option of the policy data each: where it stands and what it says.
OPTIONS: list[tuple[tuple[str, ...], Any]] = [
    (("roles", "suspended"), {kind: {"press-12": "lost", "ada": "left"} for kind in ("mtls", "jwt")}),
    (("roles", "definitions", "operator", "only"), {"kind": "mtls", "id": "ada"}),
    ((*GRANT, "mfa"), True),
    ((*GRANT, "models"), ["surface-*", "magika"]),
    ((*GRANT, "sensitivity"), "public"),
    (("models", "unlisted"), "deny"),
    (("models", "defaults", "signers"), ["0" * 64]),
    (("models", "models"), {MODEL: {"sensitivity": "restricted"}}),
    (("models", "models"), {MODEL: {"signers": []}}),
    (("models", "models"), {MODEL: {"digests": ["0" * 64]}}),
    (("models", "models"), {MODEL: {"roles": ["analyst"]}}),
    (("models", "models"), {MODEL: {"mfa": True}}),
    (("models", "models"), {MODEL: {"sanitizer": "image-dct", "output": "top-1", "receipt": True}}),
    (("models", "models"), {MODEL: {"limit": "metered"}}),
    (("models", "sensitivity", "internal", "mfa"), True),
    (("models", "sensitivity", "internal", "output"), "top-5"),
    (("models", "sensitivity", "internal", "receipt"), True),
    (("windows",), {"definitions": NEVER, "roles": {"operator": ["never"]}, "models": {}}),
    (("windows",), {"definitions": NEVER, "roles": {}, "models": {MODEL: ["never"]}}),
    (("node", "enrolled"), True),
    (("node", "serves"), {"affirming": "internal", "warning": "public"}),
    (("node", "max_attested_age_s", "internal"), 1),
    (("network", "default", "deny"), ["10.20.0.0/16"]),
    (("network", "default", "allow"), ["192.168.0.0/16", "::/0"]),
    (("network", "actions"), {"infer": {"allow": ["10.20.0.0/16"], "deny": []}}),
    (("limits", "default"), "metered"),
    (("limits", "roles"), {"operator": "bulk"}),
    (("limits", "subjects"), {"mtls": {"press-12": "bulk"}, "jwt": {"ada": "metered"}}),
    (("limits", "limits", "standard", "max_bytes"), 1000),
    (("limits", "limits", "standard", "max_batch"), 0),
    (("limits", "limits", "standard", "lifetime_budget"), 100),
    (("limits", "limits", "standard", "max_anomaly"), 0.1),
]


@pytest.fixture(scope="module")
def inferences():
    """Inferences that the shipped data allows, and as many that it denies."""
    embedded = Embedded.load()
    found: dict[bool, list[Any]] = {True: [], False: []}
    for document in generate(seed=5, count=2500):
        if document.get("action") == "infer":
            found[embedded.decide(document)["allow"]].append(document)
    return found[True][:80] + found[False][:80]


def set_option(data, path, value):
    """Set one member of the data."""
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def check_alike(data, documents):
    """Each decision is the same with and without the short cut."""
    shortened, general = Embedded.of(data), Embedded.of(data, without="plain.rego")
    for document in documents:
        assert shortened.decide(document) == general.decide(document), document


def test_decisions_are_the_same_without_the_short_cut(inferences):
    """On the shipped data the short cut changes no decision."""
    check_alike(policy_data(), inferences)


def test_the_short_cut_is_taken(inferences):
    """Most inferences that the shipped data allows take the short cut."""
    embedded = Embedded.load()
    taken = 0
    for document in inferences:
        engine = embedded.engine.clone()
        engine.set_input_json(json.dumps(document))
        taken += engine.eval_rule_as_json("data.edgewarden.plain.ok") == "true"
    assert taken > len(inferences) / 4


def test_what_is_nearly_plain_is_decided_alike():
    """A plain request with any one member absent or hostile is decided as the general rules do."""
    documents = list(near_misses(realistic_input()))
    assert len(documents) > 500
    check_alike(policy_data(), documents)


@pytest.mark.parametrize(("path", "value"), OPTIONS, ids=lambda part: ".".join(part) if isinstance(part, tuple) else "")
def test_the_short_cut_heeds_every_option(path, value, inferences):
    """With any one option of the data set, the short cut changes no decision."""
    check_alike(set_option(policy_data(), path, value), inferences)


@pytest.mark.parametrize(("path", "value"), OPTIONS, ids=lambda part: ".".join(part) if isinstance(part, tuple) else "")
def test_every_option_changes_a_decision(path, value, inferences):
    """Each option matters to some of these inputs, so that the test above could fail."""
    before, after = Embedded.load(), Embedded.of(set_option(policy_data(), path, value))
    assert any(before.decide(document) != after.decide(document) for document in inferences)
