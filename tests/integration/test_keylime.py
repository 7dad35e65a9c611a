"""A whole node against a stock Keylime: its registrar, verifier and tenant, as their wheel has them."""

import contextlib
import http.client
import shutil
import socket
import ssl

import pytest
from tpm2_pytss import ESAPI, TPM2_SU

from agent.attest.measurement import boot_aggregate
from tests.support.keylime import Keylime
from tests.support.models import write_tiny
from tests.support.node import WAIT_S, infer, records, sign_and_place, until
from tools.demo_node import DemoNode, edgewarden
from tools.software_tpm import SoftwareTpm

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("keylime"), pytest.mark.timeout(300)]

UUID = "d432fbb3-d2f1-4a97-9ef7-75bd81c00001"
BOOT_AGGREGATE = boot_aggregate([bytes(32)] * 10)
ROOMY = {"evaluation_deadline_ms": 2_000, "total_deadline_ms": 10_000}  # the machine is busy with other tests
TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    """The TPM's vendor: a CA, and the directory in which a tenant trusts it."""
    folder = tmp_path_factory.mktemp("vendor")
    tpm = SoftwareTpm(folder / "tpm", vendor=folder / "ca")
    store = folder / "store"
    store.mkdir()
    shutil.copy(folder / "ca" / "issuercert.pem", store)
    return tpm, store


@pytest.fixture(scope="module")
def keylime(tmp_path_factory, vendor):
    with Keylime(tmp_path_factory.mktemp("keylime"), vendor[1]) as servers:
        yield servers


@contextlib.contextmanager
def _node(node_home, folder, tpm, **keylime):
    """A node that is enabled for Keylime and serves one approved model."""
    shutil.copytree(node_home, folder / "n")
    settings = {
        "enabled": True,
        "uuid": UUID,
        "listen": f"127.0.0.1:{_free_port()}",
        "kernel_list": str(folder / "no-ima"),  # the software TPM is not the kernel's
        **keylime,
    }
    node = DemoNode(folder / "n", tpm.tcti, {"attest": {"keylime": settings}, "policy": ROOMY})
    for directory in node.store.iterdir():
        if directory.name != "tiny":
            shutil.rmtree(directory)
    node.configure()
    try:
        node.start()
        yield node
    finally:
        node.stop()


@pytest.fixture
def tpm(vendor):
    tpm, _ = vendor
    tpm.start()
    yield tpm
    # In order, as a kernel does it: after a loss of power the clock would be unsafe for the next test, and Keylime refuses such a quote.
    with ESAPI(tpm.tcti) as esys:
        esys.shutdown(TPM2_SU.CLEAR)
    tpm.stop()


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _policy(node, keylime, *packages):
    """What the operator approves, as a Keylime runtime policy; returns its file."""
    out = keylime.folder / "runtime-policy.json"
    arguments = [word for package in packages for word in ("--package", package)]
    bundle = node.root / "policy.tar.gz"
    edgewarden("attest", "keylime-policy", "--config", node.config, "--policy", bundle, *arguments, "--out", out)
    return out


def _add(node, keylime, policy):
    """Let the tenant add the node to the verifier; returns the tenant's answer."""
    host, _, port = node.overrides["attest"]["keylime"]["listen"].partition(":")
    verifier = ("-v", "127.0.0.1", "-vp", str(keylime.verifier_port))
    return keylime.tenant("-c", "update", "-u", UUID, "-t", host, "-tp", port, *verifier, "--runtime-policy", policy)


def _detail(node):
    return node.local("GET", "/health", surface="health")[1]["details"]["keylime"]


@pytest.fixture
def node(node_home, tmp_path, keylime, tpm):
    with _node(node_home, tmp_path, tpm, registrar=keylime.registrar_url, verifier_ca=str(keylime.ca)) as node:
        yield node


def test_an_approved_node_is_attested_until_it_loads_what_is_not_listed(node, keylime):
    """Stock servers enrol the node and attest it poll after poll; a model that their policy does not list fails it at once."""
    until(lambda: _detail(node)["registered"])
    added = _add(node, keylime, _policy(node, keylime, node.store / "tiny" / "1"))
    assert added.returncode == 0, added.stdout + added.stderr
    until(lambda: keylime.status(UUID)["attestation_count"] >= 3)
    first = keylime.status(UUID)
    assert first["attestation_status"] == "PASS", first
    assert (first["hash_alg"], first["enc_alg"], first["sign_alg"]) == ("sha256", "rsa2048", "rsassa")
    assert first["has_runtime_policy"] == 1
    sign_and_place(node, write_tiny(node.root / "new" / "late" / "1", name="late"))
    until(lambda: keylime.status(UUID)["attestation_status"] == "FAIL")
    assert "edgewarden/models/late/1/model.onnx" in keylime.log("verifier")
    assert (
        infer(node, "late", TINY).status == 200
    )  # it is signed: what the verifier makes of it is the verifier's business
    until(lambda: records(node, kind="keylime.revocation"))
    assert records(node, kind="keylime.register", outcome="ok")[0]["detail"] == {"endorsed": True}
    assert [record["outcome"] for record in records(node, kind="keylime.quote")] == ["ok"]


def test_a_node_serves_while_the_registrar_is_down(node_home, tmp_path, keylime, tpm):
    """Inference and EdgeWarden's own Evidence wait for no registrar; health and audit log say what is missing."""
    nowhere = f"http://127.0.0.1:{_free_port()}"
    with _node(node_home, tmp_path, tpm, registrar=nowhere, verifier_ca=str(keylime.ca)) as node:
        assert infer(node, "tiny", TINY).status == 200
        assert node.local("GET", f"/attestation/v1/evidence?nonce={'ab' * 32}")[0] == 200
        until(lambda: records(node, kind="keylime.register"))
        (failed,) = records(node, kind="keylime.register")
        assert failed["outcome"] == "failed"
        assert nowhere in failed["error"]
        assert _detail(node)["registered"] is False
        assert nowhere in _detail(node)["why"]


def _ask(node, path, certificate, key):
    """Call the listener with a client certificate; returns the status, or raises what TLS says."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(node.root / "state" / "keylime-listener.pem")
    context.load_cert_chain(certificate, key)
    host, _, port = node.overrides["attest"]["keylime"]["listen"].partition(":")
    client = http.client.HTTPSConnection(host, int(port), timeout=WAIT_S, context=context)
    try:
        client.request("GET", path)
        return client.getresponse().status
    finally:
        client.close()


def test_only_the_verifier_s_ca_opens_the_listener(node, keylime):
    """A certificate of Keylime's CA is answered, one of another CA, though the node trusts it elsewhere, ends in the handshake."""
    mine = (keylime.ca.parent / "client-cert.crt", keylime.ca.parent / "client-private.pem")
    assert _ask(node, "/version", *mine) == 200
    assert _ask(node, "/v2.5/quotes/identity?nonce=abc", *mine) == 200
    assert _ask(node, "/v2.5/quotes/identity?nonce=", *mine) == 400
    assert _ask(node, "/v2.5/keys/pubkey", *mine) == 404
    alice = node.client_files("alice")
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        _ask(node, "/version", alice["cert"], alice["key"])


def test_the_kernel_s_own_measurements_keep_the_mode_off(node_home, tmp_path, keylime, tpm):
    """Where the kernel's list is more than boot_aggregate the node does not start, and says why before anything is measured."""
    line = BOOT_AGGREGATE.ascii(10)
    (tmp_path / "no-ima").write_text(f"{line}\n{line}\n")
    with (
        pytest.raises(RuntimeError, match="IMA measures files into PCR 10"),
        _node(node_home, tmp_path, tpm, registrar=keylime.registrar_url, verifier_ca=str(keylime.ca)),
    ):
        pass
    assert not (tmp_path / "n" / "state" / "measurements").exists()
