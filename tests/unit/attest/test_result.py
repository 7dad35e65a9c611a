"""Attestation Results: what a node takes from its controller."""

import base64
import json

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.result import EAT_PROFILE, MAX_RESULT_BYTES, MAX_TIME_S, MAX_WITHDRAWN, AttestationResult, CheckResult
from agent.errors import VerificationError

KEY = ec.derive_private_key(11, ec.SECP256R1())
OTHER = ec.derive_private_key(12, ec.SECP256R1())
KEYS = {"k1": KEY.public_key()}
RESULT = AttestationResult(
    node="edge-1",
    status="warning",
    issued_at=1_700_000_000,
    nonce="ab" * 32,
    vector={"instance-identity": 2, "executables": 32},
    policy_id="urn:edgewarden:reference:shops:3",
    build="edgewarden-controller 0.1.0",
    checks=(CheckResult("refused", "warning", "refused: m/1/model.onnx"),),
    interval_s=30,
    withdrawn=frozenset({"cd" * 32}),
)


def _claims(**changes):
    claims = jwt.decode(RESULT.sign(KEY, "k1"), options={"verify_signature": False})
    return {name: value for name, value in (claims | changes).items() if value is not None}


def _signed(claims, key=KEY, kid="k1", algorithm="ES256"):
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


def test_a_result_reads_back_as_it_was_signed():
    """Nothing is lost on the way."""
    assert AttestationResult.verify(RESULT.sign(KEY, "k1"), KEYS, "edge-1") == RESULT


def test_a_result_is_an_ear():
    """Its claims are those of draft-ietf-rats-ear-04."""
    claims = _claims()
    assert claims["eat_profile"] == EAT_PROFILE
    assert claims["ear_verifier_id"]["build"] == RESULT.build
    assert claims["submods"]["edge-1"]["ear_status"] == "warning"
    assert claims["submods"]["edge-1"]["ear_trustworthiness_vector"] == RESULT.vector
    assert claims["submods"]["edge-1"]["ear_appraisal_policy_ids"] == [RESULT.policy_id]


def test_unknown_claims_are_ignored():
    """As the draft demands of a receiver."""
    assert AttestationResult.verify(_signed(_claims(more={"a": 1})), KEYS, "edge-1") == RESULT


APPRAISAL = _claims()["submods"]["edge-1"]


REFUSED = [
    "",
    "a.b.c",
    "x" * (MAX_RESULT_BYTES + 1),
    RESULT.sign(KEY, "k2"),
    RESULT.sign(OTHER, "k1"),
    jwt.encode(_claims(), KEY, algorithm="ES256"),
    _signed(_claims(), key="k" * 32, algorithm="HS256"),
    jwt.encode(_claims(), "", algorithm="none", headers={"kid": "k1"}),
    _signed(_claims(eat_profile="tag:github.com,2023:veraison/ear")),
    _signed(_claims(iat="now")),
    _signed(_claims(iat=None)),
    _signed(_claims(iat=-1)),
    _signed(_claims(iat=MAX_TIME_S + 1)),
    _signed(_claims(iat=10**40)),
    _signed(_claims(iat=1.5)),
    _signed(_claims(iat=True)),
    _signed(_claims(eat_nonce="short")),
    _signed(_claims(submods={})),
    _signed(_claims(submods={"edge-2": APPRAISAL})),
    _signed(_claims(submods={"edge-1": APPRAISAL, "edge-2": APPRAISAL})),
    _signed(_claims(submods={"edge-1": APPRAISAL | {"ear_status": "fine"}})),
    _signed(_claims(submods={"edge-1": APPRAISAL | {"ear_verifier_claims": {"edgewarden_interval_s": 0}}})),
    _signed(_claims(submods={"edge-1": APPRAISAL | {"ear_verifier_claims": {"edgewarden_withdrawn": ["short"]}}})),
    RESULT.sign(KEY, "k1") + "\x1b",
    RESULT.sign(KEY, "k1").replace(".", "", 1),
]


@pytest.mark.parametrize("token", REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_result_for_this_node_is_refused(token):
    """Another key, algorithm, node, shape or size: always the check ``result``."""
    with pytest.raises(VerificationError) as refusal:
        AttestationResult.verify(token, KEYS, "edge-1")
    assert refusal.value.check == "result"


def test_a_result_without_policy_is_read():
    """The draft leaves it out at will."""
    bare = {name: value for name, value in APPRAISAL.items() if name != "ear_appraisal_policy_ids"}
    result = AttestationResult.verify(_signed(_claims(submods={"edge-1": bare})), KEYS, "edge-1")
    assert result == msgspec.structs.replace(RESULT, policy_id="")


def _part(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize("where", ["header", "payload"])
def test_what_nests_without_end_is_refused(where):
    """Also under a good signature: a parser that gives up is no end of the node."""
    deep = b'{"alg":"ES256","kid":"k1","more":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    if where == "header":
        token = f"{_part(deep)}.{_part(json.dumps(_claims()).encode())}.{_part(bytes(64))}"
    else:
        token = jwt.api_jws.encode(deep, KEY, algorithm="ES256", headers={"kid": "k1"})
    with pytest.raises(VerificationError) as refusal:
        AttestationResult.verify(token, KEYS, "edge-1")
    assert refusal.value.check == "result"


def test_withdrawn_files_have_a_limit():
    """As many as it says, and not one more."""
    for more in (0, 1):
        withdrawn = [f"{number:064x}" for number in range(MAX_WITHDRAWN + more)]
        claims = APPRAISAL["ear_verifier_claims"] | {"edgewarden_withdrawn": withdrawn}
        token = _signed(_claims(submods={"edge-1": APPRAISAL | {"ear_verifier_claims": claims}}))
        if more:
            with pytest.raises(VerificationError, match="result"):
                AttestationResult.verify(token, KEYS, "edge-1")
        else:
            assert len(AttestationResult.verify(token, KEYS, "edge-1").withdrawn) == MAX_WITHDRAWN


def test_a_result_that_is_cut_or_changed_anywhere_is_refused():
    """Every length but the whole one, and a flipped bit in each character of header, payload and signature."""
    whole = RESULT.sign(KEY, "k1")
    changed = [whole[:size] for size in range(len(whole))]
    for index, char in enumerate(whole[:-1]):  # the last one has bits that say nothing
        changed.append(whole[:index] + chr(ord(char) ^ 1) + whole[index + 1 :])
    for token in changed:
        with pytest.raises(VerificationError):
            AttestationResult.verify(token, KEYS, "edge-1")
