"""A whole node and a controller: enrolment, polling, pushing, trust and what follows from it."""

import contextlib
import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.attest import Attester
from tests.support.controller import FakeController
from tests.support.node import infer, start_node, until
from tools.demo_node import ROOT
from tools.software_tpm import free_port

pytestmark = pytest.mark.integration


TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]


def attest(node, *words, token=""):
    """Run ``edgewarden attest``; returns exit code, what it printed as JSON, and its complaint."""
    command = [
        sys.executable,
        "-m",
        "agent.cli",
        "attest",
        *words,
        "--json",
        "--socket",
        str(node.root / "run" / "admin.sock"),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, input=token, timeout=60)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def enrol(node, controller, *words):
    return attest(node, "enrol", "--token-file", "-", *words, token=controller.token())


@contextlib.contextmanager
def polled(node_home, folder):
    """A node that a controller polls; both run."""
    address = f"127.0.0.1:{free_port()}"
    with (
        FakeController() as controller,
        start_node(node_home, folder, {"control": {"listen": address}}, models=("tiny",)) as node,
    ):
        code, _, error = enrol(node, controller, "--mode", "pull", "--address", address)
        assert code == 0, error
        yield node, controller


@pytest.fixture(scope="module")
def pair(node_home, tmp_path_factory):
    with polled(node_home, tmp_path_factory.mktemp("pair") / "n") as both:
        yield both


def _trust(node):
    return attest(node, "status")[1]


def _serves(node):
    return infer(node, "tiny", TINY).status == 200


def test_a_polled_node_serves_its_listener_with_the_key_that_it_enrolled(pair):
    """And takes the result of a poll."""
    _, controller = pair
    member = controller.member
    assert member is not None
    assert controller.listener_spki() == member.control_spki
    assert controller.poll()[0] in {200, 204}


def test_only_the_controller_is_heard_on_the_control_listener(pair):
    """Another node's certificate is of the same CA, and gets nothing."""
    _, controller = pair
    other = controller.client(spiffe="spiffe://fleet.example/node/edge-9")
    code, _ = controller.ask("GET", f"/attestation/v1/evidence?nonce={'ab' * 32}", context=other)
    assert code == 403


STRANGER = ec.generate_private_key(ec.SECP256R1())
FORGED: dict[str, dict[str, Any]] = {
    "a nonce that was never quoted": {"nonce": "cd" * 32},
    "another node": {"node": "edge-9"},
    "another key": {"key": STRANGER},
    "an older time": {"issued_at": 1_000_000_000},
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_or_stale_result_changes_nothing(pair, how):
    """What is not the controller's own fresh word about this node is refused, though it says better things."""
    node, controller = pair
    assert controller.poll(status="warning")[0] in {200, 204}
    before = _trust(node)
    changes: dict[str, Any] = {"status": "affirming"} | FORGED[how]
    code, body = controller.poll(**changes)
    assert code == 422, body
    assert _trust(node)["trust"] == before["trust"] == "warning"
    assert controller.poll()[0] in {200, 204}


def test_a_result_is_taken_once(pair):
    """Replayed, its nonce is none that waits for an answer."""
    _, controller = pair
    assert controller.poll()[0] in {200, 204}
    member = controller.member
    assert member is not None
    assert controller.ask("PUT", "/attestation/v1/result", member.results[-1].encode())[0] == 422
    assert controller.ask("PUT", "/attestation/v1/result", b"\xff\xfe")[0] in {400, 422}


def test_a_contraindicated_node_drops_its_models_and_a_better_result_brings_them_back(pair):
    """Without an operator; and nothing is inferred meanwhile."""
    node, controller = pair
    until(lambda: _serves(node))
    controller.poll(status="contraindicated")
    until(lambda: not _serves(node))
    controller.poll()
    until(lambda: _serves(node))


def test_an_enrolled_node_enrols_nowhere_else(pair):
    """Not before it has left."""
    node, controller = pair
    code, _, error = enrol(node, controller, "--mode", "push")
    assert code != 0
    assert "enrolled" in error


def test_a_node_that_pushes_goes_on_pushing(node_home, tmp_path):
    """The results come with each answer; the enrolment and what was withdrawn outlast a restart, and leaving ends them."""
    with FakeController() as controller, start_node(node_home, tmp_path / "n", models=("tiny",)) as node:
        code, _, error = enrol(node, controller)
        assert code == 0, error
        member = controller.member
        assert member is not None
        until(lambda: len(member.results) > 3)
        digest = hashlib.sha256(next(node.store.glob("tiny/*/model.onnx")).read_bytes()).hexdigest()
        controller.withdrawn = frozenset({digest})
        until(lambda: not _serves(node))
        node.stop()
        controller.stop()
        node.start()
        assert not _serves(node)
        controller.withdrawn = frozenset()
        controller.start()
        until(lambda: _serves(node))
        assert attest(node, "leave")[0] == 0
        assert attest(node, "leave")[0] != 0
        until(lambda: _serves(node))


def test_what_is_no_controller_enrols_nobody(node_home, tmp_path):
    """A damaged token, another server than the token's, and answers that are none, are refused; nothing secret goes to a stranger."""
    with FakeController() as controller, start_node(node_home, tmp_path / "n", models=("tiny",)) as node:
        assert attest(node, "enrol", "--token-file", "-", "--mode", "push", token="ew1.damaged")[0] != 0
        wrong = controller.token(spki_sha256="ab" * 32)
        code, _, error = attest(node, "enrol", "--token-file", "-", "--mode", "push", token=wrong)
        assert code != 0, error
        assert controller.received == []
        for handler in (_garbage, _huge, _redirect):
            controller.answers = {"/node/v1/enrol": handler}
            code, _, error = enrol(node, controller, "--mode", "push")
            assert code != 0, error
        controller.answers = {}
        controller.credential_for = Attester().ak_public
        assert enrol(node, controller, "--mode", "push")[0] != 0
        controller.credential_for = None
        code, _, error = enrol(node, controller, "--mode", "push")
        assert code == 0, error


async def _garbage(_request):
    return web.Response(body=b"\0garbage")


async def _huge(_request):
    return web.Response(body=b" " * (16 << 20))


async def _redirect(_request):
    raise web.HTTPFound("https://127.0.0.1:1/")


def test_an_expired_certificate_renews_itself(node_home, tmp_path):
    """A node whose certificate has run out comes back by its attestation key."""
    with FakeController() as controller, start_node(node_home, tmp_path / "n", models=("tiny",)) as node:
        controller.node_begin_s, controller.node_end_s = -60, 2
        code, _, error = enrol(node, controller)
        assert code == 0, error
        controller.node_end_s = 86400
        member = controller.member
        assert member is not None
        begin = len(member.results)
        until(lambda: len(member.results) > begin + 4)
        until(lambda: controller.received[-1][2])
