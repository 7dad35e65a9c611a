"""Strict documents: one meaning for the same bytes."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import VerificationError
from agent.policy.documents import MAX_DOCUMENT_DEPTH, MAX_YAML_BYTES, hashable_form, parse_json, parse_yaml

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_json_is_read_as_it_was_written(value) -> None:
    """Every JSON value comes back equal."""
    assert parse_json("x", json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"a":1,"a":2}',
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b'"\\ud800"',
        b'{"\\ud800":1}',
        b"[" * (MAX_DOCUMENT_DEPTH + 2) + b"]" * (MAX_DOCUMENT_DEPTH + 2),
        b"[" * 100_000,
        b"1" * 5000,
    ],
)
def test_ambiguous_json_is_refused(data) -> None:
    """What two parsers could read differently, or choke on, is a verification error."""
    with pytest.raises(VerificationError, match="bundle-document"):
        parse_json("x", data)


@given(st.binary(max_size=200))
def test_json_of_any_bytes_gives_a_value_or_our_error(data) -> None:
    """No bytes make the reader leak another error."""
    try:
        parse_json("x", data)
    except VerificationError:
        return


@given(st.binary(max_size=200) | st.text(alphabet="{}[]&*!<>=:-,|#%@'\" \n\tab0.e~", max_size=60).map(str.encode))
def test_yaml_of_any_bytes_gives_a_value_or_our_error(data) -> None:
    """No bytes make the reader leak another error."""
    try:
        parse_yaml("x", data)
    except VerificationError:
        return


@given(JSON.filter(lambda value: isinstance(value, dict | list)))
def test_json_is_yaml_with_the_same_meaning(value) -> None:
    """A JSON document, which is YAML too, means the same to both readers or is refused as YAML."""
    text = json.dumps(value)
    try:
        read = parse_yaml("x", text.encode())
    except VerificationError:
        assert any(mark in text for mark in ("e+", "e-", "\\u", "\\b", "\\f", "/", '"": ', "E", "1e", "?"))
        return
    assert read == value


def test_plain_yaml_is_read() -> None:
    """The subset reads as anyone would expect."""
    text = b"a: 1\nb: [x, true, false, -1.5, '2020-01-01', ~, null, \"yes\"]\nc:\n  d: text # remark\ne:\n"
    assert parse_yaml("x", text) == {
        "a": 1,
        "b": ["x", True, False, -1.5, "2020-01-01", None, None, "yes"],
        "c": {"d": "text"},
        "e": None,
    }
    assert parse_yaml("x", b"") is None


@pytest.mark.parametrize(
    "text",
    [
        "a: yes", "a: Off", "a: True", "a: 2020-01-01", "a: 0x10", "a: 012", "a: 1_000", "a: 1:30", "a: .inf", "a: 1e3",
        "a: 0o17", "a: +1", "a: 1.", "a: <<", "<<: {a: 1}", "a: =", "a: &x 1", "a: &x 1\nb: *x", "a: !!str 1",
        "a: !python/object:os.system x", "1: 2", "a: 1\na: 2", "---\na\n---\nb", "a: 1e999", "[[", "a: 12345678901234567890e400",
    ],
)  # fmt: skip
def test_yaml_with_two_meanings_is_refused(text) -> None:
    """What YAML 1.1, YAML 1.2 and JSON may read differently is refused."""
    with pytest.raises(VerificationError, match="bundle-document"):
        parse_yaml("x", text.encode())


def test_yaml_bombs_are_refused() -> None:
    """Depth and size are bounded before anything recurses or expands."""
    for bomb in (b"[" * 100_000, b"- " * 5000 + b"x", b" " * (MAX_YAML_BYTES + 1)):
        with pytest.raises(VerificationError, match="bundle-document"):
            parse_yaml("x", bomb)


@given(JSON, st.integers(min_value=0, max_value=4))
def test_a_digest_does_not_depend_on_layout(value, indent) -> None:
    """Key order and white space do not change the hashed form, which is JSON of the same value."""
    compact = json.dumps(value, sort_keys=True).encode()
    roomy = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    assert hashable_form("x", compact, is_yaml=False) == hashable_form("x", roomy, is_yaml=False)
    assert json.loads(hashable_form("x", compact, is_yaml=False)) == value


def test_numbers_are_hashed_as_they_stand() -> None:
    """1.50 and 1.5 differ, as they do to OPA."""
    assert hashable_form("x", b'{"b": 1.50, "a": 1E2}', is_yaml=False) == b'{"a":1E2,"b":1.50}'
    assert hashable_form("x", b"b: [1]\na: true\n", is_yaml=True) == b'{"a":true,"b":[1]}'


def test_the_line_separators_are_escaped_as_go_does() -> None:
    """U+2028 and U+2029 are the only characters that Go's encoder escapes and Python's does not."""
    assert hashable_form("x", '"\u2028<é>\u2029"'.encode(), is_yaml=False) == '"\\u2028<é>\\u2029"'.encode()


def test_the_safe_loader_would_have_been_fooled() -> None:
    """The ordinary loader reads a plain 'no' as false: the case that the subset exists for."""
    assert yaml.safe_load("a: no") == {"a": False}
