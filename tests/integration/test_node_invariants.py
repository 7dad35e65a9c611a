"""The invariants of the architecture, attacked on a running node. ``docs/plans/invariants.md`` names these tests and those of the rooms."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.audit.reader import verify_log
from tests.support.models import write_tiny
from tests.support.node import (
    WAIT_S,
    build_policy,
    call,
    infer,
    kill,
    processes,
    records,
    sign_and_place,
    start_node,
    tls_context,
    until,
)
from tools.demo_node import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("node-invariants")]

TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]
MIXED = [
    {"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [1]},
    {"name": "b", "datatype": "INT64", "shape": [1], "data": [1]},
    {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["x"]},
]
# Whoever is not root brings the loopback interface up as the owner of a user namespace, and is no one special to the agent.
NETLESS = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"])]
# Loops over a million million pairs, but only where the model `mixed` is asked: no trial of the policy meets it.
LOOP = """package edgewarden.site

reasons contains "looped" if {
	input.action == "infer"
	input.resource.model == "mixed"
	count([1 | some x in row; some y in row; x * y < 0]) > 0
}

row := numbers.range(1, 1000000)
"""


def _models(node):
    return {model["name"]: model for model in node.local("GET", "/admin/v1/status")[1]["models"]}


def _fact(node, name):
    status, fact = node.local("GET", f"/health/{name}", surface="health")
    assert (status == 200) == fact["holds"]
    assert fact["why"]
    return fact["holds"]


def _serves(node):
    with contextlib.suppress(OSError):
        return infer(node, "tiny", TINY).status == 200
    return False


@pytest.fixture
def node(node_home, tmp_path):
    """A node that a test may break."""
    with start_node(node_home, tmp_path / "n", models=("tiny", "mixed")) as node:
        yield node


@pytest.fixture(scope="module")
def shared(node_home, tmp_path_factory):
    """A node whose tests leave it serving."""
    with start_node(node_home, tmp_path_factory.mktemp("shared") / "n", models=("tiny", "mixed")) as node:
        yield node


# --- 1. the bytes that were hashed are the bytes that run


def test_bytes_that_change_on_the_disk_never_run(node):
    """While the weights are overwritten, an answer is the approved model's or none at all; then the model is out, and the log says why."""
    approved = infer(node, "tiny", TINY).json["outputs"]
    weights = node.store / "tiny" / "1" / "weights" / "data.bin"
    assert weights.exists()
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    seen = []

    def gone():
        reply = infer(node, "tiny", TINY)
        seen.append(reply)
        return reply.status == 404

    until(gone)
    assert all(reply.json["outputs"] == approved for reply in seen[:-1])
    assert "weights/data.bin" in _models(node)["tiny"]["reason"]
    (unload,) = records(node, kind="model.unload", model="tiny")
    (refusal,) = records(node, kind="model.refuse", model="tiny")
    assert unload["seq"] < refusal["seq"]
    (log,) = (node.root / "state" / "measurements").glob("*.ima")
    assert b"edgewarden/refused/tiny/1/weights/data.bin" in log.read_bytes()


def test_a_package_that_is_swapped_for_another_signed_one_is_measured_anew(node):
    """A new package under the old name answers only after its own bytes were measured, recorded and allowed."""
    before = infer(node, "tiny", TINY)
    old = _models(node)["tiny"]["digest"]
    sign_and_place(node, write_tiny(node.root / "new" / "tiny" / "1", seed=8))
    replies = []

    def changed():
        replies.append(infer(node, "tiny", TINY))
        return replies[-1].status == 200 and replies[-1].json != before.json

    until(changed)
    assert {reply.status for reply in replies} <= {200, 404}
    new = _models(node)["tiny"]["digest"]
    assert new != old
    loads = records(node, kind="model.load", model="tiny")
    assert [record["model_sha256"] for record in loads] == [old, new]
    first = next(record for record in records(node, kind="infer", model="tiny") if record["model_sha256"] == new)
    assert first["seq"] > loads[-1]["seq"]


def test_what_nobody_trusted_signed_is_not_loaded(shared):
    """A package by a stranger, or without a signature, is refused; the others go on."""
    sign_and_place(shared, write_tiny(shared.root / "new" / "foreign" / "1", name="foreign"), key="stranger")
    bare = shared.store / "bare" / "1"
    shutil.copytree(shared.store / "tiny" / "1", bare)
    (bare / "model.sig").unlink()
    until(lambda: _models(shared).get("foreign", {}).get("state") == "refused")
    until(lambda: _models(shared).get("bare", {}).get("state") == "refused")
    assert infer(shared, "foreign", TINY).status == infer(shared, "bare", TINY).status == 404
    assert _serves(shared)


# --- 2. fail closed; 3. durable before visible


@contextlib.contextmanager
def _disk_full(node) -> Iterator[None]:
    """The kernel refuses every further byte that the agent writes to a file."""
    _, hard = resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


def test_what_can_not_be_recorded_is_not_answered(shared):
    """Strict: without a durable record there is no answer, no admin call and no new policy; health says so; afterwards all goes on."""
    assert infer(shared, "tiny", TINY).status == 200
    bundle = build_policy(shared, "unrecorded")
    revision = shared.local("GET", "/admin/v1/policy")[1]["revision"]
    answered = len(records(shared, kind="infer"))
    with _disk_full(shared):
        for _ in range(3):
            reply = infer(shared, "tiny", TINY)
            assert (reply.status, reply.error) == (503, "the audit log can't take a record")
            assert reply.headers["Retry-After"] == "5"
            assert "outputs" not in reply.body.decode()
        assert not _fact(shared, "log_durable")
        assert shared.local("GET", "/admin/v1/status")[0] == 503
        assert shared.local("PUT", "/admin/v1/policy", bundle)[0] == 503
        assert _fact(shared, "live")
        assert _fact(shared, "enforcing")
    until(lambda: _serves(shared))
    assert _fact(shared, "log_durable")
    assert shared.local("GET", "/admin/v1/policy")[1]["revision"] == revision
    assert len(records(shared, kind="infer")) == answered + 1
    assert verify_log(shared.root / "state" / "audit").ok


def test_buffered_records_that_were_lost_are_counted(node_home, tmp_path):
    """Buffered: answers do not wait; what the disk refused is made up for by a record of how many are missing."""
    overrides = {"audit": {"durability": "buffered"}}
    with start_node(node_home, tmp_path / "n", overrides, models=("tiny",)) as node:
        assert infer(node, "tiny", TINY).status == 200
        with _disk_full(node):
            assert infer(node, "tiny", TINY).status == 200
            until(lambda: not _fact(node, "log_durable"))
        until(lambda: records(node, kind="log.dropped"))
        until(lambda: _fact(node, "log_durable"))
        assert records(node, kind="log.dropped")[0]["detail"]["count"] >= 1
        assert verify_log(node.root / "state" / "audit").ok


def test_an_answer_survives_the_death_of_the_agent(node):
    """What was answered is on the disk already: the agent is killed the moment the answer is there, and the record is found."""
    reply = infer(node, "tiny", TINY)
    node.process.kill()
    node.process.wait()
    assert records(node, decision_id=reply.headers["EdgeWarden-Decision-Id"])
    node.start()
    assert _serves(node)
    assert verify_log(node.root / "state" / "audit").ok


def test_no_policy_worker_no_answer(node_home, tmp_path):
    """A stopped policy process means deny within the total deadline, never allow and never silence."""
    overrides = {"policy": {"evaluation_deadline_ms": 200, "total_deadline_ms": 400}}
    with start_node(node_home, tmp_path / "n", overrides, models=("tiny",)) as node:
        stopped = processes(node, "ew-policy")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        reply = infer(node, "tiny", TINY)
        assert (reply.status, reply.error) == (403, "denied by policy")
        assert "no answer within" in records(node, kind="refusal")[-1]["error"]
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        until(lambda: _serves(node))


# --- 5. nothing expires into a site visit


def test_a_node_starts_again_without_its_configured_policy(node):
    """The last known good policy is kept: the next start needs neither the configured bundle nor a network."""
    node.local("PUT", "/admin/v1/policy", build_policy(node, "r2"))
    assert node.stop() == 0
    (node.root / "policy.tar.gz").unlink()
    node.start()
    assert node.local("GET", "/admin/v1/policy")[1]["revision"] == "r2"
    assert _serves(node)
    assert not _fact(node, "connected")


# --- 6. no policy can stop the node


def test_a_policy_that_loops_costs_its_own_question_only(node_home, tmp_path):
    """A rule without end denies the request that met it; requests beside it are answered, and so is the next one."""

    def prepare(node):
        bundle = build_policy(node, "loop", rego={"edgewarden/site.rego": LOOP})
        (node.root / "policy.tar.gz").write_bytes(bundle)

    overrides = {"policy": {"evaluation_deadline_ms": 500, "total_deadline_ms": 20_000}}
    with start_node(node_home, tmp_path / "n", overrides, prepare=prepare, models=("tiny", "mixed")) as node:
        good = []
        stop = threading.Event()

        def ask():
            while not stop.is_set():
                good.append(infer(node, "tiny", TINY).status)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            replies = [infer(node, "mixed", MIXED, who="bob") for _ in range(2)]
        finally:
            stop.set()
            thread.join()
        assert [(reply.status, reply.error) for reply in replies] == [(403, "denied by policy")] * 2
        assert set(good) == {200}
        (error,) = {record["error"] for record in records(node, principal="bob")}
        assert "the evaluation took over" in error
        assert _serves(node)


def test_a_killed_policy_worker_costs_its_own_question_at_most(shared):
    """Each worker is killed in turn; the requests that follow are answered by its spare and its successor."""
    for pid in processes(shared, "ew-policy"):
        with contextlib.suppress(AssertionError):  # its template was killed before, and it went with it
            kill(shared, pid)
        assert infer(shared, "tiny", TINY).status == 200
    status, answer = shared.local("PUT", "/admin/v1/policy", build_policy(shared, "after-workers"))
    assert (status, answer["revision"]) == (200, "after-workers")
    assert infer(shared, "tiny", TINY).status == 200
    assert records(shared, kind="infer")[-1]["policy_revision"] == "after-workers"


def test_a_killed_zygote_is_replaced_unnoticed(shared):
    """The fork server is no single point of failure: nothing that runs depends on it, and a new one serves the next activation."""
    (zygote,) = processes(shared, "ew-zygote")
    kill(shared, zygote)
    assert infer(shared, "tiny", TINY).status == 200
    until(lambda: set(processes(shared, "ew-zygote")) - {zygote})
    bundle = build_policy(shared, "after-zygote")
    until(lambda: shared.local("PUT", "/admin/v1/policy", bundle)[0] == 200)
    sign_and_place(shared, write_tiny(shared.root / "new" / "third" / "1", name="third"))
    until(lambda: _models(shared).get("third", {}).get("state") == "loaded")
    assert infer(shared, "third", TINY).status == 200


# --- 7. honest health


def test_a_killed_gateway_is_replaced_and_health_says_so(shared):
    """The new gateway gets the same models; meanwhile `ready` alone is false, and Evidence and the log are untouched."""
    begin, loads = shared.log.stat().st_size, len(records(shared, kind="model.load", model="tiny"))
    answered = len(records(shared, kind="infer", model="tiny"))
    until(lambda: _counted(shared) == answered)
    (gateway,) = processes(shared, "ew-gateway")
    kill(shared, gateway)
    until(lambda: shared.local("GET", f"/attestation/v1/evidence?nonce={'ab' * 32}")[0] == 200)
    until(lambda: _fact(shared, "ready") and set(processes(shared, "ew-gateway")) - {gateway})
    assert infer(shared, "tiny", TINY).status == infer(shared, "mixed", MIXED).status == 200
    events = [event["event"] for event in shared.events(begin) if event["event"] in {"ready", "not_ready"}]
    assert events == ["not_ready", "ready"]
    assert len(records(shared, kind="model.load", model="tiny")) == loads
    until(lambda: _counted(shared) == answered + 1)


def _counted(node):
    """Return the counter of answers of the tiny model, over all gateways."""
    text = node.local("GET", "/metrics", surface="health")[1]
    found = re.search(r'^edgewarden_requests_total{model="tiny",outcome="ok"} (\d+)', text, re.MULTILINE)
    return int(found[1]) if found else 0


def test_health_facts_are_separate(shared):
    """Each fact has its own truth and its own reason; what no one has reported is false."""
    status, facts = shared.local("GET", "/health", surface="health")
    assert status == 200
    assert {name: facts[name]["holds"] for name in facts if name != "details"} == {
        "live": True,
        "ready": True,
        "enforcing": True,
        "attested": True,
        "connected": False,
        "log_durable": True,
    }
    assert all(facts[name]["why"] for name in facts if name != "details")
    status, answer = shared.local("GET", "/health/well", surface="health")
    assert (status, list(answer)) == (404, ["error"])


# --- 8. no phone home


def _connections(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).net_connections("inet")
    return []


only_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="what stands in /proc of a process that is not dumpable is root's to see"
)


@only_root
def test_no_process_opens_a_connection_of_its_own(shared):
    """After work of every kind the tree has its listener, what clients opened, and the TPM's socket; nothing else, to nowhere."""
    infer(shared, "tiny", TINY)
    sign_and_place(shared, write_tiny(shared.root / "new" / "late" / "1", name="late"))
    until(lambda: _models(shared).get("late", {}).get("state") == "loaded")
    tpm = int(shared.tcti.rpartition("port=")[2])
    client = socket.create_connection(("127.0.0.1", shared.port), WAIT_S)
    try:
        for pid in [shared.process.pid, *processes(shared)]:
            for open_ in _connections(pid):
                assert open_.laddr.ip == "127.0.0.1", open_
                if open_.status == psutil.CONN_LISTEN:
                    assert open_.laddr.port == shared.port
                elif open_.laddr.port != shared.port:
                    assert open_.raddr.port in {tpm, tpm + 1}, open_
                    assert pid == shared.process.pid
    finally:
        client.close()


@pytest.mark.skipif(
    subprocess.run([*NETLESS, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs network namespaces",
)
def test_a_node_needs_no_network_at_all(node_home, tmp_path):
    """In a network namespace without any interface that is up, a node starts, serves its health and stops; nothing of it minds."""
    script = """
import sys
from pathlib import Path
from tools.demo_node import DemoNode, SoftwareTpm
import subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
root = Path(sys.argv[1])
tpm = SoftwareTpm(root / "tpm")
tpm.start()
node = DemoNode(root, tpm.tcti)
try:
    node.configure()
    node.start()
    print(node.local("GET", "/health", surface="health")[1]["ready"]["holds"])
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    print(len(routes), node.stop())
finally:
    node.stop()
    tpm.stop()
"""
    shutil.copytree(node_home, tmp_path / "n")
    command = [*NETLESS, sys.executable, "-c", script, str(tmp_path / "n")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "."},
        check=False,
    )
    assert done.stdout.split() == ["True", "0", "0"], done.stderr


@only_root
def test_every_child_has_telemetry_switched_off(shared):
    """The variable that keeps onnxruntime silent stands in the environment of every child."""
    seen = 0
    for pid in processes(shared):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # the worker of a trial ends when it likes
            assert b"ORT_DISABLE_TELEMETRY=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            seen += 1
    assert seen >= 3  # zygote, gateway, policy


# --- the end


@contextlib.contextmanager
def _half_request(node) -> Iterator[socket.socket]:
    """A request that is in work: its headers and half of its body were sent."""
    body = json.dumps({"inputs": TINY}).encode()
    with (
        socket.create_connection(("127.0.0.1", node.port), WAIT_S) as plain,
        tls_context(node).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        tls.sendall(head.encode() + body[:20])
        yield tls


def _refuses_connections(node):
    try:
        socket.create_connection(("127.0.0.1", node.port), WAIT_S).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("replaced", [False, True])
def test_a_stop_lets_requests_in_work_end(node, replaced):
    """On SIGTERM no new connection is taken, the request in work is answered and recorded, and the status is 0; a replaced gateway too."""
    if replaced:
        (gateway,) = processes(node, "ew-gateway")
        kill(node, gateway)
        until(lambda: set(processes(node, "ew-gateway")) - {gateway} and _serves(node))
    body = json.dumps({"inputs": TINY}).encode()
    with _half_request(node) as tls:
        assert _serves(node)  # by now the gateway has read what was sent before on the other connection
        node.process.send_signal(signal.SIGTERM)
        until(lambda: _refuses_connections(node))
        tls.sendall(body[20:])
        answer = tls.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nConnection: close\r\n" in answer
    assert node.stop() == 0
    kinds = [record["kind"] for record in records(node) if record.get("detail", {}).get("reason") != "repeated"]
    assert kinds[-2:] == ["infer", "node.stop"]
    assert verify_log(node.root / "state" / "audit").ok


def test_a_request_that_does_not_end_does_not_hold_up_the_stop(node_home, tmp_path):
    """The drain is bounded: a body that never comes is given up, and the status is 0."""
    overrides = {"inference": {"drain_timeout_ms": 300}}
    with start_node(node_home, tmp_path / "n", overrides, models=("tiny",)) as node, _half_request(node):
        assert _serves(node)
        assert node.stop() == 0
        assert records(node)[-1]["kind"] == "node.stop"


def test_a_stop_during_the_start_is_a_stop(node_home, tmp_path):
    """SIGTERM counts before the node serves: it ends with status 0 and leaves no process behind."""
    with start_node(node_home, tmp_path / "n") as node:
        assert node.stop() == 0
        begin = node.log.stat().st_size
        with node.log.open("ab") as log:
            command = [sys.executable, "-m", "agent.cli", "run", "--config", str(node.config)]
            node.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        until(lambda: any(event["event"] == "policy_activated" for event in node.events(begin)))
        tree = [psutil.Process(pid) for pid in processes(node) if psutil.pid_exists(pid)]
        assert tree
        assert node.stop() == 0
        assert not any(event["event"] == "serving" for event in node.events(begin))
        until(lambda: not any(_runs(process) for process in tree))


def _runs(process: psutil.Process) -> bool:
    """Whether this very process runs: its number may be another's by now, and a dead one may wait to be reaped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_agents_do_not_share_a_state(shared):
    """A second agent on the same state directory ends with exit code 3 and clear words; the first goes on."""
    done = subprocess.run(
        [sys.executable, "-m", "agent.cli", "run", "--config", str(shared.config)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 3
    assert re.fullmatch(r"edgewarden: state directory .*: another agent is running on it\n", done.stderr)
    assert _serves(shared)


def test_a_killed_agent_takes_its_children_along(node):
    """SIGKILL to the agent ends every process of its tree, and the next start is an ordinary one."""
    tree = processes(node)
    node.process.kill()
    node.process.wait()
    until(lambda: not any(_lives(pid) for pid in tree))
    node.start()
    assert call(node, "GET", "/v2").status == 200


def _lives(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
