"""Signatures go both ways between EdgeWarden and the ``model_signing`` command-line tool (OpenSSF Model Signing)."""

import subprocess
from pathlib import Path

import pytest

from agent.errors import VerificationError
from agent.inference.package import SIGNATURE_FILE, read_package
from agent.inference.signing import TrustStore, verify_package
from tests.support.models import (
    DIGITAL_SIGNATURE,
    CertificateMaker,
    new_key,
    private_pem,
    public_pem,
    sign_directory,
    write_tiny,
)

TOOL = Path(__file__).resolve().parents[2] / ".cache" / "oms" / "bin" / "model_signing"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not TOOL.exists(), reason="the model_signing tool is missing: make oms"),
]

KEY = new_key()
TRUST = TrustStore((KEY.public_key(),))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "key.pem").write_bytes(private_pem(KEY))
    (tmp_path / "pub.pem").write_bytes(public_pem(KEY))
    write_tiny(tmp_path / "tiny", external=True)
    return tmp_path


def _tool(place, *arguments, check=True):
    return subprocess.run([TOOL, *arguments], cwd=place, capture_output=True, text=True, check=check)


def _tool_signs(place, *options):
    _tool(place, "sign", "key", "tiny", "--private_key", "key.pem", "--signature", "tiny/model.sig", *options)


def _verify(directory, trust=TRUST):
    package = read_package(directory)
    try:
        return verify_package(package, trust)
    finally:
        package.close()


def test_what_the_tool_signed_verifies_here(place):
    """A package signed by the tool is accepted, with nested external data and all."""
    _tool_signs(place)
    assert _verify(place / "tiny").kind == "key"


def test_what_was_signed_here_verifies_with_the_tool(place):
    """The tool accepts our bundle, and refuses it once a file has changed."""
    sign_directory(place / "tiny", KEY)
    arguments = ["verify", "key", "tiny", "--public_key", "pub.pem", "--signature", "tiny/model.sig"]
    assert _tool(place, *arguments).returncode == 0
    (place / "tiny" / "weights" / "data.bin").write_bytes(b"other")
    assert _tool(place, *arguments, check=False).returncode != 0


def _certificates(place):
    root = CertificateMaker.root(key_usage=None)
    middle = root.issue("Middle", ca=True)
    leaf = middle.issue("Release", key_usage=DIGITAL_SIGNATURE)
    (place / "leaf.key").write_bytes(private_pem(leaf.key))
    for maker, name in ((leaf, "leaf"), (middle, "middle"), (root, "root")):
        (place / f"{name}.pem").write_bytes(maker.pem)
    return root, middle, leaf


def test_certificates_of_the_tool_verify_here(place):
    """A chain that the tool put into its bundle leads to our trusted root."""
    root, _, _ = _certificates(place)
    _tool(
        place, "sign", "certificate", "tiny", "--private_key", "leaf.key", "--signing_certificate", "leaf.pem",
        "--certificate_chain", "middle.pem", "--signature", "tiny/model.sig",
    )  # fmt: skip
    signer = _verify(place / "tiny", TrustStore(roots=(root.certificate,)))
    assert (signer.kind, signer.subject) == ("certificate", "CN=Release")


def test_our_certificates_verify_with_the_tool(place):
    """And the other way round."""
    _, middle, leaf = _certificates(place)
    sign_directory(place / "tiny", leaf.key, (leaf.certificate, middle.certificate))
    _tool(place, "verify", "certificate", "tiny", "--certificate_chain", "root.pem", "--signature", "tiny/model.sig")


@pytest.mark.parametrize("ignored", ["weights", "weights/data.bin", "model.onnx"])
def test_files_that_the_tool_was_told_to_ignore_are_unlisted_here(place, ignored):
    """The tool's own --ignore-paths can take weights out of a signature; such a package does not verify here."""
    _tool_signs(place, "--ignore-paths", f"tiny/{ignored}")
    with pytest.raises(VerificationError) as caught:
        _verify(place / "tiny")
    assert caught.value.check == "unlisted-file"


def test_files_that_the_tool_ignores_by_itself_are_unlisted_here(place):
    """The tool leaves git's files out; here nothing is left out."""
    (place / "tiny" / ".gitignore").write_text("*")
    _tool_signs(place)
    with pytest.raises(VerificationError, match=r"unlisted-file: \.gitignore"):
        _verify(place / "tiny")


def test_the_tools_signature_does_not_survive_a_change(place):
    """A file swapped after the tool has signed is found."""
    _tool_signs(place)
    assert (place / "tiny" / SIGNATURE_FILE).exists()
    (place / "tiny" / "weights" / "data.bin").write_bytes(b"other")
    with pytest.raises(VerificationError, match="file-digest"):
        _verify(place / "tiny")
