"""Tokens: what verifies, and every known way to forge one."""

import hashlib
import hmac
import json
import logging
import traceback

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ConfigError, PeerError
from agent.identity.token import MAX_JWKS_KEYS, MAX_TOKEN_BYTES, TokenVerifier, bearer_token, parse_jwks
from tests.support.identity import base64url, jwk, jwks, sign_token
from tests.support.outcome import value_or_refusal

_KEY = ec.derive_private_key(0x1234567, ec.SECP256R1())
_OTHER = ec.derive_private_key(0x7654321, ec.SECP256R1())
_NOW = 1_800_000_000.0
_CLAIMS = {"sub": "alice", "aud": "edge", "exp": _NOW + 60, "roles": ["operator"]}
_JWKS = jwks(k1=_KEY, k2=_OTHER)


def _verifier(**overrides):
    settings = {"audience": "edge", "leeway_s": 5.0, "wall_clock": lambda: _NOW, **overrides}
    return TokenVerifier(_JWKS, **settings)


def _reason(token, verifier=None):
    with pytest.raises(PeerError) as refusal:
        (verifier or _verifier()).principal(token)
    assert refusal.value.status == 401
    return refusal.value.reason


def _forge(header, claims, sign=lambda _: b"\1" * 64):
    """Write a token by hand, as an attacker does: libraries refuse to make these."""
    head, body = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims))
    signed = f"{base64url(head)}.{base64url(body)}"
    return f"{signed}.{base64url(sign(signed.encode()))}"


def _es256(data, key=_KEY):
    return jwt.algorithms.ECAlgorithm(jwt.algorithms.ECAlgorithm.SHA256).sign(data, key)


def test_a_good_token_names_its_principal():
    """The subject, the roles, the second factor and the claims come from the token."""
    claims = {**_CLAIMS, "amr": ["pwd", "mfa"], "roles": ["operator", "admin"], "team": {"name": "line 7"}}
    principal = _verifier().principal(sign_token(_KEY, claims))
    assert (principal.id, principal.kind, principal.roles, principal.mfa) == (
        "alice",
        "jwt",
        ("admin", "operator"),
        True,
    )
    assert principal.claims["team"] == {"name": "line 7"}


def test_each_key_verifies_its_own_tokens():
    """The kid selects the key; another configured key's signature does not pass under it."""
    verifier = _verifier()
    assert verifier.principal(sign_token(_OTHER, _CLAIMS, kid="k2")).id == "alice"
    assert _reason(sign_token(_OTHER, _CLAIMS, kid="k1"), verifier) == "token_signature"


def test_no_factor_is_no_second_factor():
    """Without amr, or with another method, mfa is false."""
    assert not _verifier().principal(sign_token(_KEY, _CLAIMS)).mfa
    assert not _verifier().principal(sign_token(_KEY, {**_CLAIMS, "amr": ["pwd"]})).mfa
    assert not _verifier().principal(sign_token(_KEY, {**_CLAIMS, "amr": "mfa"})).mfa


def test_roles_come_from_the_configured_claim():
    """Both a list and a string of words are read; another claim of that kind is not."""
    verifier = _verifier(roles_claim="scope")
    assert verifier.principal(sign_token(_KEY, {**_CLAIMS, "scope": "infer read"})).roles == ("infer", "read")
    assert verifier.principal(sign_token(_KEY, _CLAIMS)).roles == ()


def test_alg_none_is_refused_in_every_spelling():
    """A token without a signature is never read."""
    for name in ("none", "None", "NONE", "nOnE", ""):
        assert _reason(_forge({"alg": name, "kid": "k1"}, _CLAIMS)) == "token_algorithm"
    unsigned = jwt.encode(_CLAIMS, "", algorithm="none", headers={"kid": "k1"})
    assert _reason(unsigned) == "token_malformed"


def test_a_public_key_is_no_hmac_secret():
    """The key confusion attack: HS256 with the public key's bytes as the secret."""
    public = _KEY.public_key()
    encodings = [
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint),
        json.dumps(jwk("k1", _KEY)).encode(),
    ]
    for secret in encodings:
        token = _forge(
            {"alg": "HS256", "kid": "k1"}, _CLAIMS, lambda data, s=secret: hmac.digest(s, data, hashlib.sha256)
        )
        assert _reason(token) == "token_algorithm"
        lying = _forge(
            {"alg": "ES256", "kid": "k1"}, _CLAIMS, lambda data, s=secret: hmac.digest(s, data, hashlib.sha256)
        )
        assert _reason(lying) == "token_signature"


@pytest.mark.parametrize("algorithm", ["ES384", "ES512", "ES256K", "RS256", "PS256", "EdDSA", "HS512"])
def test_another_algorithm_is_refused(algorithm):
    """Only ES256 is accepted, whoever signed."""
    assert _reason(_forge({"alg": algorithm, "kid": "k1"}, _CLAIMS, _es256)) == "token_algorithm"


def test_a_key_in_the_header_is_never_used():
    """A token that brings its own key, or an address of one, is verified with ours and fails."""
    attacker = ec.derive_private_key(99, ec.SECP256R1())
    for extra in ({"jwk": jwk("k1", attacker)}, {"jku": "https://attacker.example/keys"}, {"x5c": ["AAAA"]}):
        assert _reason(sign_token(attacker, _CLAIMS, headers=extra)) == "token_signature"


@pytest.mark.parametrize("kid", ["", "K1", "k1\0", "../k1", "' or 1=1", "k1 ", None, 1, ["k1"], {"k1": 1}])
def test_a_kid_that_is_not_exactly_a_configured_one_is_refused(kid):
    """A kid is looked up, never interpreted."""
    assert _reason(_forge({"alg": "ES256", "kid": kid}, _CLAIMS, _es256)) == "token_unknown_key"


def test_a_token_without_kid_is_refused():
    """No key is tried by guess."""
    assert _reason(jwt.encode(_CLAIMS, _KEY, algorithm="ES256")) == "token_unknown_key"


def test_critical_extensions_are_refused():
    """What must be understood and is not ends the verification (RFC 7515, 4.1.11)."""
    assert _reason(_forge({"alg": "ES256", "kid": "k1", "crit": ["exp"]}, _CLAIMS, _es256)) == "token_header"
    assert _reason(_forge({"alg": "ES256", "kid": "k1", "b64": False}, _CLAIMS, _es256)) == "token_header"


def test_trivial_and_malleable_signatures_are_refused():
    """All-zero values (CVE-2022-21449), DER instead of raw, and short ones do not verify."""
    head = {"alg": "ES256", "kid": "k1"}
    for signature in (bytes(64), bytes(63), b"\xff" * 64, bytes(63) + b"\1", _KEY.sign(b"", ec.ECDSA(_sha256()))):
        assert _reason(_forge(head, _CLAIMS, lambda _, s=signature: s)) == "token_signature"


def _sha256():
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 -- one use

    return hashes.SHA256()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exp": None}, "token_claims"),
        ({"exp": "2100-01-01"}, "token_claims"),
        ({"exp": True}, "token_claims"),
        ({"exp": -1}, "token_claims"),
        ({"exp": 1e300}, "token_claims"),
        ({"exp": 10**400}, "token_claims"),
        ({"exp": _NOW - 5}, "token_expired"),
        ({"nbf": _NOW + 6}, "token_not_yet_valid"),
        ({"iat": _NOW + 6}, "token_not_yet_valid"),
        ({"nbf": "soon"}, "token_claims"),
        ({"aud": None}, "token_audience"),
        ({"aud": "other"}, "token_audience"),
        ({"aud": ["other"]}, "token_audience"),
        ({"aud": {"edge": 1}}, "token_audience"),
        ({"aud": "edges"}, "token_audience"),
        ({"sub": None}, "token_subject"),
        ({"sub": ""}, "token_subject"),
        ({"sub": 7}, "token_subject"),
        ({"sub": "alice\nbob"}, "token_subject"),
        ({"sub": "\u0430lice"}, "token_subject"),
        ({"sub": "a" * 257}, "token_subject"),
        ({"roles": {"operator": True}}, "token_roles"),
        ({"roles": [1]}, "token_roles"),
        ({"roles": ["a b"]}, "token_roles"),
        ({"roles": None}, "token_roles"),
        ({"roles": ["r"] * 33}, "token_roles"),
        ({"deep": [[[[[[[[1]]]]]]]]}, "token_claims"),
    ],
)
def test_claims_that_break_a_rule_are_refused(change, reason):
    """A signed token with bad claims is refused, each with its word; None stands for a claim that is absent."""
    claims = {**_CLAIMS, **change}
    if change.get("roles", 0) is not None:
        claims = {name: value for name, value in claims.items() if value is not None}
    assert _reason(_forge({"alg": "ES256", "kid": "k1"}, claims, _es256)) == reason


def test_leeway_is_given_on_both_sides():
    """A clock that is off by less than the leeway harms nobody."""
    _verifier().principal(sign_token(_KEY, {**_CLAIMS, "exp": _NOW - 4}))
    _verifier().principal(sign_token(_KEY, {**_CLAIMS, "nbf": _NOW + 5, "iat": _NOW + 5}))


def test_the_issuer_counts_where_one_is_configured():
    """A missing or another issuer is refused only then."""
    verifier = _verifier(issuer="https://id.example")
    assert verifier.principal(sign_token(_KEY, {**_CLAIMS, "iss": "https://id.example"})).id == "alice"
    assert _reason(sign_token(_KEY, _CLAIMS), verifier) == "token_issuer"
    assert _reason(sign_token(_KEY, {**_CLAIMS, "iss": "https://id.example/"}), verifier) == "token_issuer"


def test_duplicate_claims_are_refused():
    """Two readers can't see two subjects, even in a signed token."""
    body = b'{"sub":"alice","sub":"admin","aud":"edge","exp":1800000060}'
    assert _reason(_forge({"alg": "ES256", "kid": "k1"}, body, _es256)) == "token_claims"
    head = b'{"alg":"none","alg":"ES256","kid":"k1"}'
    assert _reason(_forge(head, _CLAIMS, _es256)) == "token_malformed"


def test_a_remembered_token_expires_all_the_same():
    """The memory of a verified token does not outlive its period."""
    now = _NOW
    verifier = TokenVerifier(_JWKS, audience="edge", leeway_s=0.0, wall_clock=lambda: now)
    token = sign_token(_KEY, {**_CLAIMS, "nbf": _NOW})
    first = verifier.principal(token)
    assert verifier.principal(token) is first
    now = _NOW + 60
    assert _reason(token, verifier) == "token_expired"
    now = _NOW - 1
    assert _reason(token, verifier) == "token_not_yet_valid"


def test_the_memory_of_tokens_is_bounded_and_holds_no_refused_one():
    """Only tokens that passed are kept, and the least recently used goes first."""
    verifier = _verifier(capacity=2)
    tokens = [sign_token(_KEY, {**_CLAIMS, "sub": name}) for name in "abc"]
    for token in (tokens[0], tokens[1], tokens[0], tokens[2]):
        verifier.principal(token)
    assert {known.principal.id for known in verifier._known.values()} == {"a", "c"}
    _reason(sign_token(_KEY, {**_CLAIMS, "exp": 1}), verifier)
    _reason(sign_token(_OTHER, _CLAIMS), verifier)
    assert {known.principal.id for known in verifier._known.values()} == {"a", "c"}


def test_size_is_checked_before_anything_is_parsed():
    """A token past the limit, or not ASCII, is refused for that."""
    assert _reason("a" * (MAX_TOKEN_BYTES + 1)) == "token_too_large"
    assert _reason("\u00e9.a.b") == "token_too_large"


@pytest.mark.parametrize(
    "token", ["", ".", "..", "a.b", "a.b.c.d", "a.b.", "a.b.c\n", " a.b.c", "a.b.c=", "e30.e30.e30"]
)
def test_what_is_no_token_is_refused(token):
    """Other shapes never reach a parser, or stop at the header."""
    assert _reason(token) in {"token_malformed", "token_algorithm"}


def test_no_error_shows_the_token(caplog):
    """Neither the message nor the chain of causes holds a part of the token or of its claims."""
    secret = "hunter2hunter2"
    with caplog.at_level(logging.DEBUG):
        for token in (
            _forge({"alg": "ES256", "kid": "k1"}, {**_CLAIMS, "password": secret}),
            _forge({"alg": "ES256", "kid": "k1"}, b'{"password":"' + secret.encode() + b'"', _es256),
            _forge({"alg": "ES256", "kid": secret}, _CLAIMS),
            _forge(b'{"alg": "' + secret.encode(), _CLAIMS),
        ):
            with pytest.raises(PeerError) as refusal:
                _verifier().principal(token)
            text = "".join(traceback.format_exception(refusal.value, limit=0))
            assert secret not in text
            assert not any(part in text for part in token.split(".") if len(part) > 8)
    assert secret not in caplog.text


def test_parts_that_cannot_be_decoded_are_malformed():
    """A header that is no base64 or no object, and a payload or signature of an impossible length."""
    header, payload, signature = sign_token(_KEY, _CLAIMS).split(".")
    for token in (f"a.{payload}.{signature}", f"{base64url(b'[]')}.{payload}.{signature}", f"{header}.a.{signature}"):
        assert _reason(token) == "token_malformed"
    assert _reason(f"{header}.{payload}.a") == "token_malformed"
    assert _reason(_forge({"alg": "ES256", "kid": "k1"}, b"[]", _es256)) == "token_claims"


@given(st.binary(max_size=64), st.binary(max_size=200), st.binary(max_size=80))
def test_arbitrary_parts_are_refused(head, body, signature):
    """Whatever stands in the three parts, only PeerError comes out."""
    token = ".".join(base64url(part) for part in (head, body, signature))
    assert _reason(token).startswith("token_")


@given(
    st.dictionaries(
        st.sampled_from([*_CLAIMS, "nbf", "iat", "iss", "amr"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
    )
)
def test_arbitrary_signed_claims_are_a_principal_or_a_refusal(change):
    """A trusted issuer's odd claims never raise anything but PeerError."""
    token = _forge({"alg": "ES256", "kid": "k1"}, {**_CLAIMS, **change}, _es256)
    outcome = value_or_refusal(lambda: _verifier().principal(token))
    if isinstance(outcome, PeerError):
        assert outcome.status == 401
    else:
        assert outcome.id == {**_CLAIMS, **change}["sub"]


@given(st.text(max_size=60))
def test_an_authorization_header_is_a_bearer_token_or_refused(value):
    """Only the Bearer scheme with one token passes."""
    outcome = value_or_refusal(lambda: bearer_token(value))
    if isinstance(outcome, PeerError):
        assert outcome.reason == "token_malformed"
    else:
        assert value.lower().startswith("bearer ")
        assert value.endswith(outcome)


def test_the_bearer_scheme_has_no_case():
    """RFC 9110 compares schemes without case."""
    assert bearer_token("Bearer a.b.c") == bearer_token("bearer a.b.c") == "a.b.c"
    for value in ("", "Bearer", "Bearer ", "Basic a.b.c", "Bearer a.b.c d", "Bearer a.b.c\n", "Bearer " + "a" * 9000):
        with pytest.raises(PeerError):
            bearer_token(value)


def _rsa_jwk():
    numbers = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key().public_numbers()
    return {"kty": "RSA", "kid": "r", "n": base64url(numbers.n.to_bytes(256)), "e": "AQAB"}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "'keys'"),
        (b'{"keys":{}}', "'keys'"),
        (b'{"keys":[]}', "'keys'"),
        (b'{"keys":[],"keys":[]}', "not JSON"),
        (b'{"keys":[1]}', "keys[0]: not an object"),
        (json.dumps({"keys": [_rsa_jwk()]}).encode(), "P-256"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "crv": "P-384"}]}).encode(), "P-256"),
        (json.dumps({"keys": [{"kty": "oct", "kid": "a", "k": "AAAA"}]}).encode(), "P-256"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "d": "AAAA"}]}).encode(), "private"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "alg": "HS256"}]}).encode(), "ES256"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "use": "enc"}]}).encode(), "ES256"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "key_ops": ["sign"]}]}).encode(), "verify"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "key_ops": 7}]}).encode(), "verify"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "kid": ""}]}).encode(), "kid"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "kid": None}]}).encode(), "kid"),
        (json.dumps({"keys": [jwk("a", _KEY), jwk("a", _OTHER)]}).encode(), "twice"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "x": jwk("a", _OTHER)["x"]}]}).encode(), "point"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "x": "AAAA"}]}).encode(), "point"),
        (json.dumps({"keys": [{**jwk("a", _KEY), "x": 5}]}).encode(), "point"),
        (json.dumps({"keys": [jwk(f"k{n}", _KEY) for n in range(MAX_JWKS_KEYS + 1)]}).encode(), "1 to 64"),
        (b" " * 70_000, "larger"),
    ],
)
def test_a_bad_jwks_document_is_a_configuration_error(document, words):
    """The operator learns which key is wrong and why."""
    with pytest.raises(ConfigError) as error:
        parse_jwks(document)
    assert words in str(error.value)


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=4) | st.sampled_from(["EC", "P-256", "ES256", "k1"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["keys", "kty", "crv", "kid", "x", "y", "alg", "key_ops"]), inner, max_size=8
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_an_arbitrary_jwks_document_is_a_configuration_error(document):
    """Nothing else comes out of the parser."""
    with pytest.raises(ConfigError):
        parse_jwks(document)
