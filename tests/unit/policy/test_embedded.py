"""The embedded engine: what it refuses to load, and what it answers."""

import json

import pytest
import regorus
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import PolicyError
from agent.policy.embedded import MAX_BRACKET_DEPTH, EmbeddedEngine, _refuse_http
from agent.policy.engine import Engine
from agent.policy.source import bracket_depth, calls_out
from tests.support.policy import HOSTILE, document, loaded

AUTHZ = "package edgewarden.authz\n"


def engine(*modules: str, **more) -> Engine:
    return EmbeddedEngine(loaded(*modules, **more))


def decide(subject: Engine, **value) -> object:
    return json.loads(subject.evaluate(json.dumps(value).encode()))


def test_a_decision_is_the_rules_value() -> None:
    """The engine returns the entry point's value for this input, and keeps nothing for the next."""
    subject = engine(AUTHZ + 'decision := {"allow": input.a == data.roles.a}', data={"roles": {"a": 1}})
    assert decide(subject, a=1) == {"allow": True}
    assert decide(subject, a=2) == {"allow": False}
    assert decide(subject, a=1) == {"allow": True}


def test_data_reaches_the_rules_unchanged() -> None:
    """Text, large integers, floats, null and nesting come through."""
    value = {"t": 'é\u2028"\\', "i": 2**60, "f": 1.5, "n": None, "l": [True, {"x": []}], "e": {}}
    assert decide(engine(AUTHZ + "decision := data.roles", data={"roles": value})) == value


@pytest.mark.parametrize("action", ["nothing known", "builtin error"])
def test_undefined_and_builtin_errors_are_errors(action) -> None:
    """No rule, and a builtin that fails under ``not``, give an error and never a decision."""
    with pytest.raises(PolicyError) as caught:
        engine(HOSTILE).evaluate(json.dumps(document(action)).encode())
    assert "Stack backtrace" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 200 + b"]" * 200, b'{"a":NaN}'])
def test_an_input_that_is_no_json_aborts(data) -> None:
    """The previous input is never used instead."""
    subject = engine(AUTHZ + 'decision := {"allow": true}')
    with pytest.raises(PolicyError):
        subject.evaluate(data)


def test_an_error_names_file_line_and_reason() -> None:
    """What the decision log gets is short and says where."""
    with pytest.raises(PolicyError, match=r"rego/m0\.rego:8: .*no network"):
        engine(HOSTILE).evaluate(json.dumps(document("builtin error")).encode())


def test_a_module_that_does_not_parse_is_refused() -> None:
    """Syntax errors show when the bundle is loaded."""
    with pytest.raises(PolicyError, match=r"m0\.rego:2"):
        engine(AUTHZ + "decision := {")


@pytest.mark.parametrize(
    "rule",
    [
        "decision := 1\nhidden := y if { z > 1 }",
        "decision := 1\nf(x) := y if { z > 1 }",
        "decision := 1\na := [x | y > 1]",
    ],
)
def test_a_compile_error_that_hides_is_found(rule) -> None:
    """An unsafe variable, which parses, is found before any decision gets there."""
    with pytest.raises(PolicyError, match="unsafe"):
        engine(AUTHZ + 'decision := {"allow": true}', "package other.deep\n" + rule).check()


def test_packages_with_odd_names_are_checked() -> None:
    """Dashes and dots in a package's name, and a package without rules, are no obstacle."""
    engine(AUTHZ + "decision := 1", 'package other["b.c-d"].e\nx := 1', "package other.empty").check()
    with pytest.raises(PolicyError, match="unsafe"):
        engine(AUTHZ + "decision := 1", 'package other["b.c-d"].e\nx := y if { y > 1 }').check()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("io.jwt.decode(input.x)", "io.jwt.decode"),
        ("http.send({})", "http.send"),
        ("crypto.x509.parse_certificates(input.x)", "crypto.x509.parse_certificates"),
        ("nobody(1)", "nobody"),
        ("data.other.nobody(1)", "data.other.nobody"),
        ("lib.nobody(1)", "lib.nobody"),
        ("[y | some y in [net.lookup_ip_addr(input.x)]]", "net.lookup_ip_addr"),
        ("{x: y | x := 1; every z in [1] { z == foo.bar(2) }; y := 2}", "foo.bar"),
    ],
)
def test_functions_that_are_nowhere_are_refused_by_name(call, name) -> None:
    """A call that would fail only when a decision gets there fails the load."""
    with pytest.raises(PolicyError, match="neither in the bundle nor in the embedded engine") as caught:
        engine(AUTHZ + f"import data.other.lib\ndecision := 1\nf(x) := {call}", "package other.lib\ng(x) := x")
    assert f"function {name} " in str(caught.value)


def test_functions_of_the_bundle_are_found() -> None:
    """Local names, dotted names, imports, aliases and absolute paths resolve."""
    code = """import data.other.lib
import data.other.lib as l
import rego.v1
decision := [local(1), a.b(2), lib.g(3), l.g(4), data.other.lib.g(5), data.edgewarden.authz.local(6), count([7])] if { print("x") }
local(x) := x
a.b(x) := x
odd[1](x) := x
default local(_) := 0
"""
    assert decide(engine(AUTHZ + code, "package other.lib\ng(x) := x")) == [1, 2, 3, 4, 5, 6, 1]


def test_http_send_raises_even_when_called() -> None:
    """Should the load's check be passed, the call itself is an error."""
    bare = regorus.Engine()
    bare.add_extension("http.send", 1, _refuse_http)
    bare.add_policy("x.rego", 'package x\ny if not http.send({"url": "http://127.0.0.1:1"})')
    with pytest.raises(RuntimeError, match="opens no connection"):
        bare.eval_query_as_json("data.x.y")


@pytest.mark.parametrize("data", [{"edgewarden": {"authz": {"decision": {"allow": True}}}}, {"edgewarden": {"authz": {}}},
                                  {"edgewarden": {"authz": {"more": 1}}}, {"edgewarden": 1}])  # fmt: skip
def test_data_that_overlaps_a_package_is_refused(data) -> None:
    """Data at, below or instead of a package's path would override its rules."""
    with pytest.raises(PolicyError, match="override"):
        engine(AUTHZ + 'decision := {"allow": false}', data=data)


def test_a_package_outside_the_roots_is_refused() -> None:
    """A bundle may not define what its manifest does not claim."""
    with pytest.raises(PolicyError, match="outside the roots"):
        engine("package stranger\nx := 1")


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{", "}"), ("[{1:", "}]"), ("f(", ")")])
def test_deep_brackets_are_refused_before_they_are_parsed(opening, closing) -> None:
    """Source that would take the parser minutes is refused by counting."""
    with pytest.raises(PolicyError, match="nested 60 deep" if len(opening) != 4 else "nested 120 deep"):
        engine(AUTHZ + f"decision := {opening * 60}1{closing * 60}")
    assert decide(engine(AUTHZ + f"decision := {'[' * MAX_BRACKET_DEPTH}1{']' * MAX_BRACKET_DEPTH}"))


@pytest.mark.parametrize(
    ("source", "depth"),
    [
        ("", 0), ("[{(1)}]", 3), ("[][]", 1), ('"[[["', 0), ("`[[\n[`", 0), ("# [[[\n[", 1), ('"\\"[" [', 1), ("]]][[", 2),
        ('"open [\n[[', 2), ('"\\\\" [[', 2), ("`\\` [[", 2), ('"# not a comment" [', 1), ("`open [[", 0),
    ],
)  # fmt: skip
def test_strings_and_comments_do_not_count(source, depth) -> None:
    """Only code is counted, and an open quote hides no more than its line."""
    assert bracket_depth(source) == depth


@given(st.text(alphabet='[]{}()"`#\\\n a', max_size=80))
def test_counting_ends_for_any_source(source) -> None:
    """The count is at most the number of opening brackets, for any text."""
    assert 0 <= bracket_depth(source) <= sum(map(source.count, "[{("))


def test_outbound_calls_are_seen() -> None:
    """A mention in code counts, one in a string or comment does not."""
    assert calls_out("x := http . send({})") == "http.send"
    assert calls_out("net.lookup_ip_addr(x)") == "net.lookup_ip_addr"
    assert calls_out('# http.send\nx := "http.send"') is None
