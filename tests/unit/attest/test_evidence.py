"""The form in which Evidence and Reference Values travel."""

import hashlib
import json

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.evidence import MAX_EVIDENCE_BYTES, Claims, Evidence, extra_data, quoted_pcrs
from agent.attest.reference import MAX_REFERENCE_BYTES, BootRule, ReferenceValues
from agent.errors import ConfigError, VerificationError
from tests.support.attest import NONCE, REFERENCE, Attester, with_reference

EVIDENCE = Attester().evidence()
WIRE = EVIDENCE.encode()
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _changed(path, value):
    document = json.loads(WIRE)
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(document).encode()


def test_evidence_comes_back_as_written():
    """Decoding is the inverse of encoding, and the wire has the contract's names."""
    assert Evidence.decode(WIRE) == EVIDENCE
    document = json.loads(WIRE)
    assert set(document) == {"attest", "signature", "pcrs", "entries", "claims"}
    assert {"version", "node", "boot_id", "from", "count", "audit", "policy_sha256"} < set(document["claims"])


def test_extra_data_is_what_the_contract_says():
    """An independent RFC 8785 implementation gives the same extraData."""
    claims = json.loads(WIRE)["claims"]
    inner = hashlib.sha256(rfc8785.dumps(claims)).digest()
    assert extra_data(NONCE, EVIDENCE.claims) == hashlib.sha256(b"edgewarden/evidence/v1\0" + NONCE + inner).digest()


@given(st.sampled_from(["attest", "signature", "pcrs", "entries", "claims"]), _json)
def test_a_foreign_value_in_any_field_is_a_verification_error(key, value):
    """Whatever stands in a field, decoding gives Evidence or a VerificationError, and so do the claims' bytes."""
    try:
        Evidence.decode(_changed([key], value)).claims.canonical()
    except VerificationError as error:
        assert error.check == "encoding"  # noqa: PT017 -- both ends of the claim


@given(st.binary(max_size=64) | st.integers(0, len(WIRE)).map(lambda end: WIRE[:end]))
def test_bytes_that_are_not_evidence_are_a_verification_error(data):
    """Whatever the bytes, decoding gives Evidence or a VerificationError."""
    try:
        assert Evidence.decode(data) == EVIDENCE
    except VerificationError as error:
        assert error.check == "encoding"  # noqa: PT017 -- both ends of the claim


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["extra"], 1),
        (["attest"], "not base64!"),
        (["pcrs", "sha1"], {}),
        (["pcrs", "sha256", "0"], "AB" * 32),
        (["pcrs", "sha256", "0"], "ab" * 32 + "\n"),
        (["pcrs", "sha256", "x"], "ab" * 32),
        (["claims", "version"], 2),
        (["claims", "extra"], 1),
        (["claims", "from"], -1),
        (["claims", "count"], 1.5),
        (["claims", "count"], 2**53),
        (["claims", "node"], ""),
        (["claims", "policy_sha256"], None),
        (["claims", "posture"], {"a": {"deep": 1}}),
        (["claims", "posture"], {str(at): 1 for at in range(65)}),
    ],
)
def test_evidence_has_one_form(path, value):
    """An unknown field, a wrong type, a null or a number out of range is refused."""
    with pytest.raises(VerificationError) as raised:
        Evidence.decode(_changed(path, value))
    assert raised.value.check == "encoding"


@pytest.mark.parametrize("posture", [{"n": 2**53}, {"ä": 1}])
def test_claims_without_a_canonical_form_are_refused(posture):
    """What canonical JSON can't carry without doubt is a VerificationError, not a ValueError."""
    claims = msgspec.structs.replace(EVIDENCE.claims, posture=posture)
    with pytest.raises(VerificationError) as raised:
        claims.canonical()
    assert raised.value.check == "encoding"


def test_a_lone_surrogate_is_refused():
    """A word that is no Unicode text has no canonical form."""
    with pytest.raises(VerificationError):
        Claims(node="\ud800", boot_id="b", start=0, count=0).canonical()


def test_evidence_has_a_greatest_size():
    """One byte over the limit is refused before parsing."""
    with pytest.raises(VerificationError, match="over"):
        Evidence.decode(bytes(MAX_EVIDENCE_BYTES + 1))


def test_the_measurement_pcr_is_quoted_with_the_boot_pcrs():
    """PCRs 0-9, 11 and the measurement PCR are quoted, each once."""
    assert quoted_pcrs(14) == (*range(10), 11, 14)
    assert quoted_pcrs(8) == (*range(10), 11)


def test_reference_values_come_back_as_written():
    """Decoding is the inverse of encoding, and encoding is deterministic."""
    values = with_reference(boot={0: BootRule("pinned", frozenset({"aa" * 32, "bb" * 32}))})
    assert ReferenceValues.decode(values.encode()) == values
    assert ReferenceValues.decode(values.encode()).encode() == values.encode()


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"version": 2},
        {"measurement": {"pcr": 16}},
        {"measurement": {"pcr": 10}},
        {"measurement": {"pcr": 14, "start": "00"}},
        {"configs": ["x"]},
        {"policy": {}},
        {"models": {"m/1/f": ["AA" * 32]}},
        {"boot": {"12": {"mode": "exact"}}},
        {"boot": {"10": {"mode": "exact"}}},
        {"boot": {"0": {"mode": "sometimes"}}},
    ],
)
def test_reference_values_are_strict(change):
    """A typing error in Reference Values is a ConfigError, never a value that approves nothing in silence."""
    document = json.loads(REFERENCE.encode()) | change
    with pytest.raises(ConfigError):
        ReferenceValues.decode(json.dumps(document).encode())


@given(st.binary(max_size=64) | _json.map(lambda value: json.dumps(value).encode()))
def test_nothing_but_a_config_error_leaves_the_reference_decoder(data):
    """Whatever the bytes, the operator gets a ConfigError."""
    with pytest.raises(ConfigError):
        ReferenceValues.decode(data)


def test_reference_values_have_a_greatest_size():
    """One byte over the limit is refused before parsing."""
    with pytest.raises(ConfigError, match="over"):
        ReferenceValues.decode(bytes(MAX_REFERENCE_BYTES + 1))
