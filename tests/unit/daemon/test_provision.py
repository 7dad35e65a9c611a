"""What the agent takes from its surroundings: modes of files, addresses, users, key material."""

import os
import shutil
import socket
import stat

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization

from agent.config import load
from agent.daemon import provision
from agent.errors import ConfigError, HostError
from tests.support.ek_chains import ROOT, armoured, of_version
from tests.support.identity import jwks
from tests.support.models import new_key
from tools.demo_node import DemoNode
from tools.pki import Authority


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    node = DemoNode(tmp_path_factory.mktemp("node"), "swtpm:port=1")
    node.prepare()
    (node.root / "jwks.json").write_bytes(jwks(k1=new_key()))
    return node.root


@pytest.fixture
def node(home, tmp_path):
    shutil.copytree(home, tmp_path / "n")
    return DemoNode(tmp_path / "n", "swtpm:port=1")


def settings(node, /, **overrides):
    node.overrides = overrides
    node.configure()
    return load(node.config)


def test_sockets_are_bound_and_do_not_listen_yet(node):
    """TCP listeners refuse connections until something serves; the admin socket is for the owner's group, health for all."""
    listeners = provision.bind_listeners(
        settings(
            node,
            metrics={"listen": "127.0.0.1:0"},
            control={"listen": "127.0.0.1:0", "certificate": "c", "key": "k", "client_ca": "a"},
        )
    )
    assert listeners.control is not None
    assert listeners.metrics is not None
    for sock in (listeners.inference, listeners.control, listeners.metrics):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(sock.getsockname())
    run = node.root / "run"
    assert stat.S_IMODE((run / "admin.sock").stat().st_mode) == 0o660
    assert stat.S_IMODE((run / "health.sock").stat().st_mode) == 0o666
    listeners.close()


def test_a_socket_left_behind_is_replaced(node):
    """A Unix socket of an agent that died is no obstacle."""
    for _ in range(2):
        provision.bind_listeners(settings(node)).close()


def test_an_address_that_is_taken_is_named(node):
    """A port in use is a host error that names setting and address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HostError, match=rf"inference\.listen: {address}: Address already in use"):
            provision.bind_listeners(settings(node, inference={"listen": address}))


def test_a_path_too_long_for_a_socket_is_named(node):
    """A runtime directory whose path does not fit a socket's address says so."""
    with pytest.raises(HostError, match="too long"):
        provision.bind_listeners(settings(node, node={"runtime_dir": "r" * 150}))


def test_a_directory_that_can_not_be_made_is_named(node):
    """A file in the way of a directory is a host error that names the setting."""
    (node.root / "file").touch()
    with pytest.raises(HostError, match=r"node\.runtime_dir: .*/file/x"):
        provision.make_directory("node.runtime_dir", node.root / "file" / "x")
    with pytest.raises(HostError, match="state directory"):
        provision.lock_state(node.root / "file" / "x")


def test_the_state_has_one_holder(tmp_path):
    """The lock of a state directory is held by one process's descriptor; the directory is its owner's alone."""
    held = provision.lock_state(tmp_path / "state")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    assert not os.get_inheritable(held)
    with pytest.raises(HostError, match="another agent is running"):
        provision.lock_state(tmp_path / "state")
    os.close(held)
    os.close(provision.lock_state(tmp_path / "state"))


@pytest.mark.parametrize(
    ("mode", "secret", "refused"),
    [
        (0o600, True, False),
        (0o640, True, False),
        (0o644, True, True),
        (0o620, True, True),
        (0o602, True, True),
        (0o644, False, False),
        (0o664, False, True),
        (0o646, False, True),
    ],
)
def test_the_mode_of_a_file_decides(tmp_path, mode, secret, refused):
    """Nothing that others can write is read; of a secret, nothing that strangers can read."""
    path = tmp_path / "file.pem"
    path.write_bytes(b"content")
    path.chmod(mode)
    if refused:
        with pytest.raises(ConfigError, match=f"setting: .*mode {mode:o} is too open"):
            provision.read_pem("setting", str(path), secret=secret)
    else:
        assert provision.read_pem("setting", str(path), secret=secret) == b"content"


def test_what_is_no_pem_file_is_named(tmp_path):
    """A missing file, a directory and a file beyond the limit are errors of the configuration."""
    with pytest.raises(ConfigError, match=r"setting: .*none: No such file"):
        provision.read_pem("setting", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"setting: .*: Is a directory"):
        provision.read_pem("setting", str(tmp_path))
    (tmp_path / "large").write_bytes(b"x" * (provision.MAX_PEM_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than"):
        provision.read_pem("setting", str(tmp_path / "large"))


def test_a_certificates_key_has_a_digest(node):
    """The digest is that of the key's SPKI; what is no certificate is named by its setting."""
    pem = (node.root / "pki" / "node.pem").read_bytes()
    assert len(bytes.fromhex(provision.spki_sha256("x", pem))) == 32
    with pytest.raises(ConfigError, match="setting: not a PEM certificate"):
        provision.spki_sha256("setting", b"no certificate")
    with pytest.raises(ConfigError, match="setting: not a PEM certificate"):
        provision.spki_sha256("setting", armoured(of_version(7, ROOT.der())))


def test_a_gateway_is_given_sealed_key_material(node):
    """Certificate, key, CA and JWKS go as sealed descriptors; the limits are the configuration's."""
    tokens = {"jwks": "jwks.json", "audience": "edge", "issuer": "https://i"}
    chosen = settings(node, inference={"tokens": tokens, "max_connections": 7}, audit={"durability": "buffered"})
    with socket.socket() as listener:
        spec, files = provision.gateway_spec(chosen, listener)
        assert set(spec.fds) == {"listener", "certificate", "key", "client_ca", "jwks"}
        assert os.pread(spec.fds["key"], 100_000, 0) == (node.root / "pki" / "node.key").read_bytes()
        assert spec.args["max_connections"] == 7
        assert spec.args["strict_audit"] is False
        assert spec.args["tokens"] == {"audience": "edge", "issuer": "https://i", "roles_claim": "roles"}
        for file in files:
            file.close()


def _foreign(root):
    Authority.open(root / "pki").server("other")
    shutil.copy(root / "pki" / "other.key", root / "pki" / "node.key")


def _encrypted(root):
    path = root / "pki" / "node.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"words")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_foreign, r"inference\.key: they do not load together"),
        (_encrypted, r"inference\.key: they do not load together"),
        (lambda root: (root / "pki" / "node.pem").write_text("none"), r"inference\.key: they do not load together"),
        (lambda root: (root / "pki" / "ca.pem").write_text("none"), r"inference\.client_ca: not PEM"),
        (lambda root: (root / "pki" / "node.key").chmod(0o644), r"inference\.key: .*too open"),
        (lambda root: (root / "jwks.json").write_text("{}"), "jwks: 'keys' must be"),
    ],
)
def test_key_material_that_does_not_fit_is_an_error_at_the_start(node, spoil, words):
    """A key of another certificate, an encrypted one, or none at all is the operator's to mend, before any process starts."""
    spoil(node.root)
    chosen = settings(node, inference={"tokens": {"jwks": "jwks.json", "audience": "edge"}})
    with socket.socket() as listener, pytest.raises(ConfigError, match=words):
        provision.gateway_spec(chosen, listener)


def test_models_are_trusted_by_key_and_root(node):
    """Keys and roots of the configuration make one trust store."""
    chosen = settings(node)
    provision.trust_store(chosen)
    broken = msgspec.structs.replace(chosen, models=msgspec.structs.replace(chosen.models, trusted_keys=["/nowhere"]))
    with pytest.raises(ConfigError, match=r"models\.trusted_keys: /nowhere"):
        provision.trust_store(broken)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its children another user")
def test_children_of_root_are_not_root(node):
    """Started as root, the agent gives its children nobody, or the configured user, and never root."""
    assert provision.child_user(settings(node)) == (65534, 65534)
    assert provision.child_user(settings(node, node={"child_user": "daemon"})) == (1, 1)
    with pytest.raises(ConfigError, match="must not run as root"):
        provision.child_user(settings(node, node={"child_user": "root"}))
    with pytest.raises(ConfigError, match="there is no user"):
        provision.child_user(settings(node, node={"child_user": "nobody-at-all"}))
