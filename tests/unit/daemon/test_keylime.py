"""What the Keylime mode reads and makes before anything is measured."""

import os
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from agent.attest.measurement import boot_aggregate
from agent.config import KeylimeSettings
from agent.daemon.keylime import IDENTITY_FILE, prepare_keylime, read_kernel_list
from agent.errors import ConfigError, HostError
from tools.pki import Authority


@pytest.fixture
def settings(tmp_path):
    Authority.create(tmp_path / "pki")
    return KeylimeSettings(
        enabled=True,
        uuid="node-1",
        registrar="http://127.0.0.1:1",
        verifier_ca=str(tmp_path / "pki" / "ca.pem"),
        kernel_list=str(tmp_path / "ima"),
    )


def _prepare(settings, tmp_path):
    mode = prepare_keylime(settings, tmp_path)
    assert mode is not None
    return mode


def test_a_mode_that_is_off_makes_nothing(tmp_path):
    """Without the setting there is no key, no file, no mode."""
    assert prepare_keylime(KeylimeSettings(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_listener_s_key_is_made_once(settings, tmp_path):
    """The key is its owner's alone, the certificate is its own, does not end, and is the same at the next start."""
    mode = _prepare(settings, tmp_path)
    path = tmp_path / IDENTITY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate(mode.certificate)
    certificate.verify_directly_issued_by(certificate)
    assert certificate.not_valid_after_utc.year == 9999
    assert certificate.subject.rfc4514_string() == "CN=node-1"
    key = serialization.load_pem_public_key(mode.public_key)
    assert key == certificate.public_key()
    assert b"PRIVATE" not in mode.certificate + mode.public_key
    again = _prepare(settings, tmp_path)
    assert (again.certificate, again.public_key) == (mode.certificate, mode.public_key)


def test_a_key_that_others_can_read_is_refused(settings, tmp_path):
    """A key whose file was opened to others is not used."""
    _prepare(settings, tmp_path)
    (tmp_path / IDENTITY_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match="too open"):
        prepare_keylime(settings, tmp_path)


@pytest.mark.parametrize("data", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_key_s_file_that_is_none_is_told(data, settings, tmp_path):
    """A file that holds something else names itself and the way out."""
    (tmp_path / IDENTITY_FILE).write_bytes(data)
    (tmp_path / IDENTITY_FILE).chmod(0o600)
    with pytest.raises(HostError, match="remove the file"):
        prepare_keylime(settings, tmp_path)


def test_a_state_directory_that_takes_no_key_is_told(settings, tmp_path):
    """Where the key can't be written the error names the file."""
    with pytest.raises(HostError, match=IDENTITY_FILE):
        prepare_keylime(settings, tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "no certificate"])
def test_a_ca_that_is_none_names_its_setting(text, settings, tmp_path):
    """The CA's file that holds no certificate is an error of that setting."""
    (tmp_path / "pki" / "ca.pem").write_text(text)
    with pytest.raises(ConfigError, match=r"attest\.keylime\.verifier_ca"):
        prepare_keylime(settings, tmp_path)


def test_the_kernel_s_list_is_read_before_a_key_is_made(settings, tmp_path):
    """One boot_aggregate is followed; more keeps the mode off and leaves nothing behind; a directory is no list."""
    line = boot_aggregate([bytes(32)]).ascii(10)
    (tmp_path / "ima").write_text(f"{line}\n")
    assert read_kernel_list(tmp_path / "ima").lines == (line,)
    (tmp_path / "ima").write_text(f"{line}\n{line}\n")
    with pytest.raises(HostError, match="IMA"):
        prepare_keylime(settings, tmp_path)
    assert not (tmp_path / IDENTITY_FILE).exists()
    assert read_kernel_list(tmp_path / "none").lines == ()
    assert read_kernel_list(tmp_path / "ima" / "none").lines == ()
    with pytest.raises(ConfigError, match="kernel_list"):
        read_kernel_list(tmp_path / "pki")


def test_a_half_written_key_is_not_taken(settings, tmp_path):
    """What a killed agent left of a new key is thrown away."""
    fresh = (tmp_path / IDENTITY_FILE).with_suffix(".new")
    os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY, 0o644))
    _prepare(settings, tmp_path)
    assert not fresh.exists()
