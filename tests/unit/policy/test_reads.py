"""What a policy can read of its input: never less than it does."""

import copy
import json

import pytest
import regorus

from agent.errors import PolicyError
from agent.policy.build import build
from agent.policy.bundle import Bundle
from agent.policy.embedded import EmbeddedEngine
from agent.policy.reads import MAX_READS, references
from bench.realistic_policy import realistic_data, realistic_input, write
from tests.support.policy import loaded
from tests.support.policy_inputs import HOSTILE, generate, near_misses
from tests.support.rego import POLICIES, REGO

HEAD = "package edgewarden.authz\n"


def modules_of(source: str):
    engine = regorus.Engine()
    engine.add_policy("x.rego", source)
    return json.loads(engine.get_ast_as_json())


def engine_of(source: str) -> EmbeddedEngine:
    return EmbeddedEngine(loaded(HEAD + source))


def outcome(engine, document):
    """A decision, or that there is none."""
    try:
        return json.loads(engine.evaluate(json.dumps(document).encode()))
    except PolicyError:
        return None


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("x if input.a.b == 1", {("a", "b")}),
        ('x if input["a"]["b"].c', {("a", "b", "c")}),
        ("x if input.a[i].b", {("a",)}),
        ("x if input.a[input.b]", {("a",), ("b",)}),
        ("x if input.a[input.b[input.c]].d", {("a",), ("b",), ("c",)}),
        ("x if { y := input; y.a }", {()}),
        ("x if input[k]", {()}),
        ("x if { some v in input.list; v == 1 }", {("list",)}),
        ("x if not input.a", {("a",)}),
        ("x if { every v in input.list { v == input.b } }", {("list",), ("b",)}),
        ("x := [v | v := input.a[_]]", {("a",)}),
        ("x := {k: v | some k, v in input.a}", {("a",)}),
        ("f(p) := p.c\nx := f(input.a)", {("a",)}),
        ("x if { y with input.a as 1 }\ny if input.b", {("a",), ("b",)}),
        ("x := 1 if { false } else := input.z", {("z",)}),
        ("default x := false\nx if walk(input.tree, [p, v])", {("tree",)}),
        ("x contains input.a", {("a",)}),
        ("x[input.a] := input.b", {("a",), ("b",)}),
        ('x := object.get(input, "a", 1)', {()}),
        ('x := {"input": data.input.y}', set()),
        ("x := `input.a`", set()),
    ],
)  # fmt: skip
def test_every_mention_of_the_input_is_found(source, paths):
    """Constant members of a reference are its path; what follows a member that is no constant is not looked at."""
    found = {path for module in modules_of("package p\n" + source) for path in references(module["ast"], "input")}
    assert found == paths


def test_an_import_is_a_mention():
    """An alias stands for the whole of what it names."""
    (module,) = modules_of("package p\nimport input.request as r\nx if r.time")
    assert ("request",) in set(references(module["ast"], "input"))


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        ('decision := {"allow": true} if input.request.time', ("time",)),
        ('decision := {"allow": true} if { input.subject.id; input.request.rate["1s"] < 3; input.request.bytes }', ("bytes", "rate")),
        ('decision := {"allow": true} if input.subject', ()),
        ('decision := {"allow": true} if { r := input.request; r.time }', None),
        ('decision := {"allow": true} if input.request[x]', None),
        ('decision := {"allow": true} if count(input) > 0', None),
        ('decision := {"allow": true} if time.now_ns() > 0', None),
        ('decision := {"allow": true} if rand.intn("x", 5) >= 0', None),
        ('decision := {"allow": true} if uuid.rfc4122("x")', None),
        ('decision := {"allow": true} if opa.runtime()', None),
        ('decision := {"allow": true}\nunused if time.now_ns() > 0', None),
        ('decision := {"allow": true} if time.weekday(time.parse_rfc3339_ns(input.request.time)) == "Monday"', ("time",)),
        ('decision := {"allow": true} if ' + "{" + "\n".join(f"not input.request.m{n}" for n in range(MAX_READS + 1)) + "}", None),
    ],
)  # fmt: skip
def test_a_policy_says_what_its_decisions_depend_on(rule, reads):
    """Members of the request by name; None where a decision is no function of them."""
    assert engine_of(rule).request_reads == reads


def test_a_function_of_the_bundle_is_no_builtin():
    """A bundle's own function may have any name: its body is looked at as every other rule is."""
    source = 'now_ns(x) := x\ndecision := {"allow": true} if data.edgewarden.authz.now_ns(input.request.time)'
    assert engine_of(source).request_reads == ("time",)


@pytest.mark.parametrize("replaced", ["lower", "data.edgewarden.authz.f"])
def test_no_builtin_stands_in_for_a_function(replaced):
    """What looks elsewhere is always called by its name: the engine takes no builtin behind ``with``, where the calls do not show it."""
    source = f'f(x) := x\ndecision := y if {{ y := lower(f("A")) with {replaced} as uuid.rfc4122 }}'
    with pytest.raises(PolicyError, match=r"unsafe|undefined"):
        engine_of(source).evaluate(b"{}")


@pytest.fixture(scope="module", params=["shipped", "realistic"])
def engine(request, tmp_path_factory):
    policies = POLICIES
    if request.param == "realistic":
        policies = tmp_path_factory.mktemp("realistic") / "policies"
        write(policies, realistic_data(seed=7))
    return EmbeddedEngine(Bundle.from_bytes(build(REGO, policies, "test"), []))


def test_the_shipped_policy_can_be_remembered(engine):
    """No rule reads what is never the same twice."""
    assert engine.request_reads == ("anomaly", "batch", "budget_left", "bytes", "source_ip", "time")


def test_what_is_not_read_changes_nothing(engine):
    """Whatever stands in the members that the policy can't read, or in new ones: the decision is the same, or the same error."""
    documents = [*generate(11, 150), *near_misses(realistic_input())]
    for document in documents:
        if not isinstance(document.get("request"), dict):
            continue
        expected = outcome(engine, document)
        for value in HOSTILE[::4]:
            other = copy.deepcopy(document)
            other["request"] = {
                member: value for member in ("rate", "unheard_of") if member not in (engine.request_reads or ())
            } | {name: kept for name, kept in other["request"].items() if name in (engine.request_reads or ())}
            assert outcome(engine, other) == expected
