"""The controller's MakeCredential in software against a TPM's ActivateCredential."""

import contextlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent.attest.structures import AkKind, parse_ak_public
from agent.attest.tpm import Tpm
from agent.errors import TpmError
from controller.trust.credential import make_credential
from controller.trust.endorsement import load_roots, parse_ek_public, verify_endorsement
from tests.support.swtpm import SwTpm

pytestmark = pytest.mark.integration
SECRET = bytes(range(32))
PROFILES = ["EK-RSA2048", "EK-ECC256"]


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory):
    with SwTpm(tmp_path_factory.mktemp("tpm"), manufactured=True) as running:
        yield running


@pytest.fixture
def tpm(swtpm):
    with contextlib.closing(Tpm(swtpm.tcti)) as door:
        yield door


def _ek(tpm, profile):
    return parse_ek_public(tpm.ek_public(profile))


def _name(tpm):
    return parse_ak_public(tpm.ak_public).name


def _opens(tpm, profile, credential):
    return tpm.activate_credential(AkKind.ECC_P256, profile, *credential)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("secret", [SECRET, b"\0" * 32, b"s"], ids=["32 bytes", "zeros", "one byte"])
def test_the_tpm_opens_what_was_made_for_its_keys(tpm, profile, secret):
    """RSA 2048 and ECC P-256, again and again: each time another seed, each time the same secret."""
    made = [make_credential(_ek(tpm, profile), _name(tpm), secret) for _ in range(4)]
    assert len(set(made)) == 4
    assert [_opens(tpm, profile, one) for one in made] == [secret] * 4


def test_the_tpm_opens_what_was_made_for_the_key_in_its_vendor_s_certificate(swtpm, tpm):
    """The whole way of an enrolment: certificate, chain to the vendor's root, credential, secret."""
    (found,) = tpm.endorsements(("EK-RSA2048",))
    roots = load_roots([str(swtpm.vendor / "swtpm-localca-rootca-cert.pem")])
    issuer = x509.load_pem_x509_certificate((swtpm.vendor / "issuercert.pem").read_bytes())
    moment = max(issuer.not_valid_before_utc, x509.load_der_x509_certificate(found.certificate).not_valid_before_utc)
    key = verify_endorsement(found.certificate, [_der(issuer)], found.public, roots, moment).key
    assert _opens(tpm, found.profile, make_credential(key, _name(tpm), SECRET)) == SECRET


def _der(certificate):
    return certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_credential_for_another_attestation_key_stays_closed(tpm, profile):
    """Not for a key of the same TPM, and not for a name that differs in its last bit."""
    name = _name(tpm)
    for other in (name[:-1] + bytes([name[-1] ^ 1]), b"\x00\x0b" + bytes(32), b""):
        with pytest.raises(TpmError, match="activate"):
            _opens(tpm, profile, make_credential(_ek(tpm, profile), other, SECRET))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_credential_for_another_endorsement_key_stays_closed(tpm, profile, tmp_path):
    """Not for the key of another TPM of the same template, and not for this TPM's other one."""
    with SwTpm(tmp_path) as other, contextlib.closing(Tpm(other.tcti)) as elsewhere:
        foreign = _ek(elsewhere, profile)
    (second,) = set(PROFILES) - {profile}
    for key in (foreign, _ek(tpm, second)):
        with pytest.raises(TpmError):
            _opens(tpm, profile, make_credential(key, _name(tpm), SECRET))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_credential_with_a_flipped_byte_stays_closed(tpm, profile):
    """Each byte of the credential and of the encrypted seed; for RSA, whose key a TPM makes slowly, each seventh."""
    blob, encrypted = make_credential(_ek(tpm, profile), _name(tpm), SECRET)
    step = 7 if profile == "EK-RSA2048" else 1
    for at in range(0, len(blob), step):
        with pytest.raises(TpmError):
            _opens(tpm, profile, (_flipped(blob, at), encrypted))
    for at in range(0, len(encrypted), step):
        with pytest.raises(TpmError):
            _opens(tpm, profile, (blob, _flipped(encrypted, at)))
    assert _opens(tpm, profile, (blob, encrypted)) == SECRET


def _flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0x01]) + data[at + 1 :]
