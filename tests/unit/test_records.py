"""Canonical encoding and the structs that cross process boundaries."""

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from agent.records import AuditEvent, Decision, canonical, decode

_keys = st.text(st.characters(max_codepoint=127), max_size=8)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


@given(_values)
def test_canonical_agrees_with_rfc8785(value):
    """Our canonical form is the one that an independent RFC 8785 implementation writes."""
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [1.5, {"ä": 1}, 2**53, [{"a": -(2**53)}], {"a": object()}])
def test_disputed_values_have_no_canonical_form(value):
    """What implementations would encode differently is refused."""
    with pytest.raises(ValueError):
        canonical(value)


@pytest.mark.parametrize(
    "data",
    [b"{}", b'{"allow":1}', b'{"allow":true,"extra":1}', b'{"allow":true,"reasons":"x"}', b"[]", b"", b'{"allow":tru'],
)
def test_a_malformed_decision_is_an_error(data):
    """A decision that is not exactly version 1 never decodes."""
    with pytest.raises(ValueError):
        decode(data, Decision)


def test_an_audit_event_needs_its_kind_and_outcome():
    """An event without a kind, time and outcome is refused, and so is an unknown outcome."""
    with pytest.raises(ValueError):
        decode(b'{"kind":"infer","time_us":1}', AuditEvent)
    with pytest.raises(ValueError):
        decode(b'{"kind":"infer","time_us":1,"outcome":"maybe"}', AuditEvent)
