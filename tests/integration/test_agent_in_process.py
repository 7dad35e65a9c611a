"""The control plane in the test's own process, so that its code can be looked into: the same start, the same children, a client on a thread."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess

import pytest
import structlog

from agent.config import Environment, load
from agent.daemon import run
from agent.errors import ConfigError, TpmError
from agent.isolation.kernel import prctl
from tests.support.models import write_tiny
from tests.support.node import WAIT_S, build_policy, call, infer, records, sign_and_place, until
from tools.demo_node import DemoNode, SoftwareTpm
from tools.pki import Authority

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("agent-in-process")]

TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]
NONCE = "ab" * 32
_PR_SET_CHILD_SUBREAPER = 36
ROOMY = {"evaluation_deadline_ms": 2_000, "total_deadline_ms": 10_000}


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def prepared(node_home, tmp_path):
    """A node's files with addresses that are known before the start, and its TPM."""
    shutil.copytree(node_home, tmp_path / "n")
    tpm = SoftwareTpm(tmp_path / "n" / "tpm")
    tpm.start()
    node = DemoNode(tmp_path / "n", tpm.tcti)
    node.port = _free_port()
    Authority.open(node.root / "pki").server("control")
    control = {"listen": f"127.0.0.1:{_free_port()}", "certificate": "pki/control.pem", "key": "pki/control.key"}
    node.overrides = {
        "inference": {"listen": f"127.0.0.1:{node.port}", "drain_timeout_ms": 2_000},
        "control": {**control, "client_ca": "pki/ca.pem"},
        "metrics": {"listen": f"127.0.0.1:{_free_port()}"},
        "policy": ROOMY,
    }
    node.configure()
    for name in ("magika", "orientation"):
        shutil.rmtree(node.store / name)
    yield node
    tpm.stop()


def _with_agent(node, work, notify=None):
    """Run the agent on this thread and ``work`` on another; returns what the work returned."""
    settings = load(node.config)
    environment = Environment(notify_socket=notify, watchdog_usec=None, path=os.defpath, python_path=None)

    def go():
        try:
            until(lambda: (node.root / "run" / "admin.sock").exists() and _answers(node))
            return work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        result = pool.submit(go)
        try:
            with structlog.testing.capture_logs() as logs:
                run(settings, environment)
        finally:
            # An agent that ended by itself is still sent the signal, which must not end the tests.
            signal.signal(signal.SIGTERM, lambda *_: None)
            concurrent.futures.wait([result])
            signal.signal(signal.SIGTERM, before)
            prctl(_PR_SET_CHILD_SUBREAPER, 0)
    return result.result(), logs


def _answers(node):
    with contextlib.suppress(OSError):
        return node.local("GET", "/admin/v1/status")[0] == 200
    return False


def _models(node):
    return {model["name"]: model["state"] for model in node.local("GET", "/admin/v1/status")[1]["models"]}


def _change_policies(node):
    """A policy that does not load, bytes that are none, one that denies a model, and one that allows it again."""
    before = node.local("GET", "/admin/v1/policy")[1]
    bad = build_policy(node, "bad", rego={"edgewarden/site.rego": "package edgewarden.site\n\nreasons contains x if y"})
    assert node.local("PUT", "/admin/v1/policy", bad)[0] == 422
    assert node.local("PUT", "/admin/v1/policy", b"no bundle")[0] == 422
    assert node.local("GET", "/admin/v1/policy")[1] == before
    strict = build_policy(node, "strict", {"models": {"models": {"mixed": {"signers": ["0" * 64]}}}})
    assert node.local("PUT", "/admin/v1/policy", strict)[1]["revision"] == "strict"
    assert _models(node) == {"tiny": "loaded", "mixed": "refused"}
    assert call(node, "GET", "/v2/models/mixed").status == 404
    assert node.local("PUT", "/admin/v1/policy", build_policy(node, "r3"))[1]["revision"] == "r3"
    assert _models(node) == {"tiny": "loaded", "mixed": "loaded"}


def _change_models(node):
    """A file that changes and comes back, a package that comes and goes, and one that lies under another's name."""
    target = node.store / "tiny" / "1" / "model.yaml"
    text = target.read_text()
    target.write_text(text + "# another byte\n")
    until(lambda: _models(node)["tiny"] == "refused")
    target.write_text(text)
    until(lambda: _models(node)["tiny"] == "loaded")
    sign_and_place(node, write_tiny(node.root / "new" / "late" / "1", name="late"))
    status, answer = node.local("POST", "/admin/v1/models/rescan")
    assert status == 200
    assert "late" in {model["name"] for model in answer["models"]}
    shutil.copytree(node.store / "late" / "1", node.store / "wrong" / "2")
    until(lambda: _models(node).get("wrong") == "refused")
    shutil.rmtree(node.store / "late")
    until(lambda: "late" not in _models(node))


def _curl(*words):
    return subprocess.run(["curl", "-sS", *words], capture_output=True, check=True, timeout=30).stdout


def _prove(node):
    """Evidence on both surfaces: the control listener's names its own key."""
    local = node.local("GET", f"/attestation/v1/evidence?nonce={NONCE}")[1]
    assert "control_spki_sha256" not in local["claims"]
    assert node.local("GET", f"/attestation/v1/evidence?nonce={NONCE}&from=999999")[0] == 400
    assert "ak_public" in node.local("GET", "/attestation/v1/ak")[1]
    files = node.client_files("alice")
    address = f"https://{node.overrides['control']['listen']}/attestation/v1/evidence?nonce={NONCE}"
    answer = _curl("--cacert", files["ca"], "--cert", files["cert"], "--key", files["key"], address)
    claims = json.loads(answer)["claims"]
    assert len(claims["control_spki_sha256"]) == 64
    assert claims["audit"]["size"] > 10


def test_a_whole_life(prepared, tmp_path):
    """Start, serve, policies good and bad, models that change and come back, Evidence on both surfaces, metrics, stop; all of it recorded."""
    node = prepared

    def work():
        status = node.local("GET", "/admin/v1/status")[1]
        assert (status["node"], status["policy"]["revision"]) == ("edge-0001", "r1")
        assert infer(node, "tiny", TINY).status == 200
        _change_policies(node)
        _change_models(node)
        _prove(node)
        metrics = _curl(f"http://{node.overrides['metrics']['listen']}/metrics")
        assert b'edgewarden_health{fact="ready"} 1.0' in metrics

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify.sock"))
        manager.settimeout(WAIT_S)
        _, logs = _with_agent(node, work, str(tmp_path / "notify.sock"))
        assert {manager.recv(1000).split(b"=")[0] for _ in range(3)} >= {b"READY", b"STATUS"}
    assert [event["event"] for event in logs].count("serving") == 1
    kinds = [record["kind"] for record in records(node)]
    assert (kinds[0], kinds[-1]) == ("node.start", "node.stop")
    activations = [
        (record["outcome"], record.get("policy_revision", "")) for record in records(node, kind="policy.activate")
    ]
    assert activations == [("ok", "r1"), ("refused", ""), ("refused", ""), ("ok", "strict"), ("ok", "r3")]
    denied = records(node, kind="model.load", outcome="denied")
    assert [(record["model"], record["reasons"]) for record in denied] == [("mixed", ["signer_not_trusted"])]
    assert {record["principal"] for record in records(node, kind="admin")} == {f"uid:{os.getuid()}"}


def test_what_keeps_it_from_starting_is_told_and_recorded(prepared):
    """A foreign key, a TPM that is gone: the error has its blame, nothing stays behind, and the next start is an ordinary one."""
    node = prepared
    key = node.root / "pki" / "control.key"
    good = key.read_bytes()
    key.write_bytes((node.root / "pki" / "alice.key").read_bytes())
    with pytest.raises(ConfigError, match=r"control\.key"):
        run(load(node.config), Environment(None, None, os.defpath, None))
    key.write_bytes(good)
    tcti, node.tcti = node.tcti, "swtpm:host=127.0.0.1,port=1"
    node.configure()
    with pytest.raises(TpmError):
        run(load(node.config), Environment(None, None, os.defpath, None))
    node.tcti = tcti
    node.configure()
    reply, _ = _with_agent(node, lambda: infer(node, "tiny", TINY))
    assert reply.status == 200
