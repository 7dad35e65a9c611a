"""The embedded engine's two ways to read a decision: one rule, or rules below its name."""

import json

import pytest

from agent.errors import PolicyError
from agent.policy.build import archive
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine

PACKAGE = "package edgewarden.authz\n"


def engine(source, data=None):
    manifest = json.dumps({"revision": "t", "roots": ["edgewarden", "facts"], "rego_version": 1}).encode()
    files = {".manifest": manifest, "authz.rego": (PACKAGE + source).encode()}
    files["data.json"] = json.dumps({"facts": data or {}}).encode()
    return EmbeddedEngine(Bundle.from_bytes(archive(files)))


@pytest.mark.parametrize(
    "source",
    [
        'decision := {"allow": true} if input.good',
        'default decision := {"allow": false}\ndecision := {"allow": true} if input.good',
        'decision := {"allow": true} if { input.good } else := {"allow": false}',
        "decision.allow := true if input.good",
        "decision.allow if input.good",
        'decision["allow"] := data.facts.answer if input.good',
    ],
)
def test_a_decision_is_read_however_it_is_written(source):
    """One rule, a default, an else, and rules below the decision's name give the same decision."""
    assert json.loads(engine(source, {"answer": True}).evaluate(b'{"good": true}'))["allow"] is True


@pytest.mark.parametrize("source", ['decision := {"allow": true} if input.good', 'other := {"allow": true}'])
def test_an_undefined_decision_is_an_error(source):
    """A decision whose conditions do not hold, or that no rule makes, is an error and never a value."""
    with pytest.raises(PolicyError, match="undefined"):
        engine(source).evaluate(b'{"good": false}')


@pytest.mark.parametrize("source", ['decision := {"allow": true} if not blocked', "decision.allow if not blocked"])
def test_a_builtins_error_does_not_turn_into_undefined(source):
    """A builtin that fails below a negation fails the decision, in either way to read it."""
    with pytest.raises(PolicyError, match="not-a-network"):
        engine(f'{source}\nblocked if net.cidr_contains("not-a-network", input.ip)').evaluate(b'{"ip": "10.0.0.1"}')


def test_nothing_of_one_input_is_left_for_the_next_decision():
    """An input decides its own question only: the same engine answers each input as a fresh one would."""
    one = engine('decision := {"allow": true, "who": input.who} if input.good')
    assert json.loads(one.evaluate(b'{"good": true, "who": "a"}'))["who"] == "a"
    with pytest.raises(PolicyError, match="undefined"):
        one.evaluate(b'{"who": "b"}')
    assert json.loads(one.evaluate(b'{"good": true, "who": "c"}'))["who"] == "c"
    with pytest.raises(PolicyError):
        one.evaluate(b"not JSON")
