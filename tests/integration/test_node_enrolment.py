"""A whole node and a controller: enrolment, polling, pushing, trust and what follows from it."""

import json
import socket
import subprocess
import sys

import pytest

from tests.support.controller import FakeController
from tests.support.node import start_node, until
from tools.demo_node import ROOT

pytestmark = pytest.mark.integration


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


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


def test_pull(node_home, tmp_path):
    """A node that is polled serves its control listener with the key that it enrolled."""
    address = f"127.0.0.1:{_free_port()}"
    with (
        FakeController() as controller,
        start_node(node_home, tmp_path / "n", {"control": {"listen": address}}, models=("tiny",)) as node,
    ):
        code, _, error = enrol(node, controller, "--mode", "pull", "--address", address)
        assert code == 0, error
        assert controller.member is not None
        assert controller.listener_spki() == controller.member.control_spki


def test_push(node_home, tmp_path):
    """A node that pushes goes on pushing: the results come with each answer."""
    with FakeController() as controller, start_node(node_home, tmp_path / "n", models=("tiny",)) as node:
        code, _, error = enrol(node, controller)
        assert code == 0, error
        member = controller.member
        assert member is not None
        until(lambda: len(member.results) > 3)
