"""The controller's keys: made once, loaded whole or not at all; what its certificates say."""

import json
import stat

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ConfigError, VerificationError
from controller.trust.authority import Authority, request_key, spki_sha256
from controller.trust.node_tls import certificate_spki, poll_context
from tests.support.ek_chains import ROOT, armoured, of_version


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "keys", "fleet.example", ["localhost", "127.0.0.1"])


def test_keys_are_readable_by_their_owner_alone(authority):
    """And they load again as they were."""
    for path in authority.directory.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Authority.load(authority.directory, "fleet.example")
    assert again.result_kid == authority.result_kid
    assert again.ca_pem == authority.ca_pem


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "result.key"])
def test_a_key_that_is_missing_or_damaged_is_a_configuration_error(authority, name):
    """It names the file, or what is wrong."""
    (authority.directory / name).write_text("no key")
    with pytest.raises(ConfigError, match="keys"):
        Authority.load(authority.directory, "fleet.example")
    (authority.directory / name).unlink()
    with pytest.raises(ConfigError, match=name):
        Authority.load(authority.directory, "fleet.example")


def test_a_ca_of_no_version_is_a_configuration_error(authority):
    """What the library calls by another name is one of the operator's files all the same."""
    (authority.directory / "ca.pem").write_bytes(armoured(of_version(7, ROOT.der())))
    with pytest.raises(ConfigError, match="keys"):
        Authority.load(authority.directory, "fleet.example")


def _write(path, key):
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_keys_that_are_not_its_own_are_refused(authority):
    """Another CA's key beside the certificate; a key of another kind."""
    _write(authority.directory / "ca.key", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of ca\.pem"):
        Authority.load(authority.directory, "fleet.example")
    _write(authority.directory / "ca.key", rsa.generate_private_key(65537, 2048))
    with pytest.raises(ConfigError, match="not an EC key"):
        Authority.load(authority.directory, "fleet.example")


def test_a_directory_that_can_t_be_written_is_a_configuration_error(tmp_path):
    """A file stands in its way."""
    (tmp_path / "keys").write_text("")
    with pytest.raises(ConfigError):
        Authority.create(tmp_path / "keys", "fleet.example", ["localhost"])


def test_a_poller_needs_its_certificate(authority):
    """Without it no node would answer."""
    assert poll_context(authority).verify_mode.name == "CERT_NONE"
    (authority.directory / "server.pem").write_text("")
    with pytest.raises(ConfigError, match=r"server\.pem"):
        poll_context(authority)


def test_no_certificate_that_it_issues_can_sign_others(authority):
    """A node's is for client and server use, with one name, and no CA's."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    issued = authority.issue("node/edge-1", "edge-1", key, 3600)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert issued.spki_sha256 == spki_sha256(key)
    certificate.verify_directly_issued_by(authority.certificate)


def test_the_published_keys_verify_results_and_hold_no_secret(authority):
    """RFC 7517, with the key's name."""
    (member,) = json.loads(authority.jwks())["keys"]
    assert member["kid"] == authority.result_kid
    assert "d" not in member
    token = jwt.encode({}, authority.result_key, algorithm="ES256")
    assert jwt.decode(token, jwt.PyJWK(member).key, algorithms=["ES256"]) == {}


def _request(key):
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


REQUEST = _request(ec.generate_private_key(ec.SECP256R1()))


def test_a_certificate_request_is_signed_by_its_own_p256_key():
    """Damaged, or of another kind of key: refused."""
    key = ec.generate_private_key(ec.SECP256R1())
    assert request_key(_request(key)) == key.public_key()
    good = _request(key)
    for bad in (
        b"",
        good[:-1] + bytes([good[-1] ^ 1]),
        of_version(5, good),
        _request(rsa.generate_private_key(65537, 2048)),
        _request(ec.generate_private_key(ec.SECP384R1())),
    ):
        with pytest.raises(VerificationError) as refusal:
            request_key(bad)
        assert refusal.value.check == "csr"


@given(st.data())
def test_a_damaged_certificate_request_is_refused_and_nothing_else_happens(data):
    """Any byte changed, cut or put in: a VerificationError, never another error and never another key."""
    at = data.draw(st.integers(0, len(REQUEST) - 1))
    change = data.draw(st.binary(max_size=3).filter(lambda found: found != REQUEST[at : at + 1]))
    with pytest.raises(VerificationError) as refusal:
        request_key(REQUEST[:at] + change + REQUEST[at + 1 :])
    assert refusal.value.check == "csr"


@given(st.binary(max_size=600))
def test_bytes_are_no_certificate_request(data):
    """Whatever a node sends in its place."""
    with pytest.raises(VerificationError):
        request_key(data)
    assert certificate_spki(data) == ""


def test_what_is_no_certificate_has_no_key():
    """And is like no key that a node has."""
    assert certificate_spki(None) == certificate_spki(b"garbage") == ""
    assert certificate_spki(of_version(7, ROOT.der())) == ""
    assert certificate_spki(ROOT.der()) == spki_sha256(ROOT.key.public_key())
