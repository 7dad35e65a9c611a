"""Signatures: who signed, and what."""

import json

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ConfigError, VerificationError
from agent.policy.build import sign
from agent.policy.bundle import Bundle, read_archive
from agent.policy.signature import SIGNATURES_FILE, load_crypto, sign_files, verify_files
from tests.support.policy import bundle, keypair

PRIVATE, PUBLIC = keypair()
FILES = {".manifest": b'{"roots":["a"]}', "data.json": b'{"a":{"x":1.50}}', "a.rego": b"package a"}


def signed(files=FILES, **claims) -> dict[str, bytes]:
    content = dict(files)
    content[SIGNATURES_FILE] = sign_files(files, PRIVATE, **claims)
    return content


def with_payload(payload: bytes, alg: str = "ES256", key=None) -> dict[str, bytes]:
    if key is None:
        key = serialization.load_pem_private_key(PRIVATE, None)
    token = jwt.api_jws.encode(payload, key, algorithm=alg)
    return {**FILES, SIGNATURES_FILE: json.dumps({"signatures": [token]}).encode()}


def refused(files) -> str:
    with pytest.raises(VerificationError) as caught:
        verify_files(files, [PUBLIC])
    assert caught.value.check in {"bundle-signature", "bundle-document"}
    return caught.value.message


def test_what_was_signed_verifies_with_any_of_the_trusted_keys() -> None:
    """One of several keys is enough; its name does not matter."""
    verify_files(signed(), [keypair(1)[1], PUBLIC])
    verify_files(signed(key_id="fleet"), [PUBLIC])
    load_crypto()


def test_white_space_in_a_structured_file_is_not_content() -> None:
    """OPA hashes the value of data.json, not its layout."""
    verify_files({**signed(), "data.json": b'{ "a": {"x": 1.50} }'}, [PUBLIC])


@pytest.mark.parametrize(
    "change",
    [
        {"data.json": b'{"a":{"x":1.5}}'},
        {"a.rego": b"package a "},
        {"b.rego": b"package b"},
        {"README": b""},
        {".manifest": b'{"roots":["b"]}'},
    ],
)
def test_any_change_is_found(change) -> None:
    """A changed, or an added file, is refused by name."""
    assert next(iter(change)) in refused({**signed(), **change})


def test_a_missing_file_is_found() -> None:
    """Leaving a signed file out is refused."""
    files = signed()
    del files["a.rego"]
    assert "a.rego" in refused(files)


def test_only_trusted_keys_count() -> None:
    """A good signature by a stranger is refused."""
    with pytest.raises(VerificationError, match="no trusted key"):
        verify_files(signed(), [keypair(1)[1]])


def test_an_unsigned_bundle_is_refused_where_keys_are_trusted() -> None:
    """The signature is asked for, and nowhere else."""
    plain = bundle("package edgewarden")
    Bundle.from_bytes(plain)
    with pytest.raises(VerificationError, match="not signed"):
        Bundle.from_bytes(plain, [PUBLIC])
    assert Bundle.from_bytes(sign(plain, PRIVATE), [PUBLIC]).revision == "test"


def test_signing_again_replaces_the_signature() -> None:
    """A bundle carries one signature, the last."""
    twice = sign(sign(bundle("package edgewarden"), keypair(1)[0]), PRIVATE)
    Bundle.from_bytes(twice, [PUBLIC])
    assert len(json.loads(read_archive(twice)[SIGNATURES_FILE])["signatures"]) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{}", b'{"signatures":[]}', b'{"signatures":["a","b"]}', b'{"signatures":[1]}', b'{"signatures":["x"]}',
        b'{"signatures":["a.b.c"]}', b'{"signatures":["e30.e30."]}', b'{"signatures":["\\u00e9.e30.e30"]}',
        b'{"signatures":["bnVsbA.e30.e30"]}', b'{"signatures":["W10.e30.e30"]}',
    ],
)  # fmt: skip
def test_a_malformed_signature_file_is_refused(content) -> None:
    """No shape of the file leaks another error."""
    refused({**FILES, SIGNATURES_FILE: content})


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"files":1}',
        b'{"files":[{}]}',
        b'{"files":[{"name":1,"hash":"","algorithm":"SHA-256"}]}',
    ],
)
def test_a_malformed_payload_is_refused(payload) -> None:
    """What a trusted key signed must still be a list of files."""
    refused(with_payload(payload))


def test_a_weaker_digest_is_refused() -> None:
    """Only SHA-256 counts, also when a trusted key signed something else."""
    entries = [{"name": name, "hash": "0" * 32, "algorithm": "MD5"} for name in FILES]
    assert "MD5" in refused(with_payload(json.dumps({"files": entries}).encode()))


def test_a_file_is_listed_once() -> None:
    """A list with a file twice, by either spelling, is refused."""
    listed = [{"name": name, "hash": "0", "algorithm": "SHA-256"} for name in ["a.rego", "/a.rego"]]
    assert "twice" in refused(with_payload(json.dumps({"files": listed}).encode()))


def test_other_algorithms_are_refused() -> None:
    """The token cannot choose its algorithm: neither none, nor HMAC with the public key as secret, nor RSA."""
    payload = json.dumps({"files": []}).encode()
    unsigned = jwt.api_jws.encode(payload, "", algorithm="none")
    refused({**FILES, SIGNATURES_FILE: json.dumps({"signatures": [unsigned]}).encode()})
    refused(with_payload(payload, "HS256", b"x" * 32))
    refused(with_payload(payload, "RS256", rsa.generate_private_key(65537, 2048)))


@given(st.binary(max_size=120))
def test_any_signature_bytes_give_our_error(content) -> None:
    """No bytes make the verifier leak another error."""
    refused({**FILES, SIGNATURES_FILE: content})


@given(st.text(max_size=60))
def test_any_token_gives_our_error(token) -> None:
    """No token makes the verifier leak another error."""
    refused({**FILES, SIGNATURES_FILE: json.dumps({"signatures": [token]}).encode()})


def other_keys() -> list[bytes]:
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    keys = (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048))
    return [b"", b"x", PUBLIC, *(key.private_bytes(serialization.Encoding.PEM, form, none) for key in keys)]


@pytest.mark.parametrize("number", range(5))
def test_only_p256_keys_sign(number) -> None:
    """Another key, or none, is a configuration error."""
    with pytest.raises(ConfigError, match="signing key"):
        sign(bundle("package edgewarden"), other_keys()[number])


def test_an_encrypted_key_is_refused_with_words() -> None:
    """A key with a passphrase is a configuration error, not a crash."""
    key = serialization.load_pem_private_key(PRIVATE, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    with pytest.raises(ConfigError, match="signing key"):
        sign_files({}, secret)


def test_only_p256_keys_are_trusted() -> None:
    """A trusted key of another kind is a configuration error."""
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ConfigError, match="P-256"):
        verify_files({}, [pem])
