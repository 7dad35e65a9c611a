"""A real node with a TPM and a real controller, joined and steered by the command line alone."""

import contextlib
import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.support.node import infer, start_node, until
from tools.demo_controller import DemoController
from tools.demo_node import ROOT
from tools.software_tpm import free_port

TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]
MIXED = [
    {"name": "a", "datatype": "FP32", "shape": [1, 1], "data": [1.0]},
    {"name": "b", "datatype": "INT64", "shape": [1], "data": [1]},
    {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["t"]},
]
pytestmark = [pytest.mark.integration, pytest.mark.slow]


def edgewarden(*words, text=""):
    """Run the command line; returns exit code, output and complaint."""
    command = [sys.executable, "-m", "agent.cli", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, input=text, timeout=60)
    return done.returncode, done.stdout, done.stderr


def ok(*words, text=""):
    code, output, complaint = edgewarden(*words, text=text)
    assert code == 0, complaint + output
    return output


@contextlib.contextmanager
def controller(folder, vendor):
    """``controller init`` and ``controller run``; yields the admin's directory."""
    made = DemoController(folder, vendor)
    made.prepare()
    made.start()
    try:
        yield made.admin
    finally:
        made.stop()


def _status(admin, name):
    shown = json.loads(ok("node", "show", name, "--json", "--admin", admin))
    return shown["status"], [check["name"] for check in shown.get("checks", [])]


@pytest.mark.parametrize("mode", ["pull", "push"])
def test_trust_follows_what_a_node_runs(node_home, tmp_path, mode):
    """Affirming; a tampered model is a warning until it is repaired; a withdrawn one is contraindicated until the node has dropped it for good."""
    address = f"127.0.0.1:{free_port()}"
    overrides = {"control": {"listen": address}} if mode == "pull" else {}
    root = tmp_path / "n"
    with (
        start_node(node_home, root, overrides, models=("tiny", "mixed"), manufactured=True) as node,
        controller(tmp_path / "c", root / "vendor") as admin,
    ):
        packages = [word for path in sorted(node.store.glob("*/*")) for word in ("--package", path)]
        ok(
            "reference",
            "approve",
            "--config",
            node.config,
            "--policy",
            root / "policy.tar.gz",
            *packages,
            "--admin",
            admin,
        )
        token = ok("token", "create", "--admin", admin)
        where = ("--address", address) if mode == "pull" else ()
        agent = ("--socket", root / "run" / "admin.sock")
        ok("attest", "enrol", "--token-file", "-", "--mode", mode, *where, *agent, text=token)
        name = yaml.safe_load(node.config.read_text())["node"]["id"]
        assert _status(admin, name) == ("affirming", [])
        assert infer(node, "tiny", TINY).status == 200

        (package,) = node.store.glob("tiny/*")
        shutil.copytree(package, tmp_path / "whole")
        with (package / "model.onnx").open("r+b") as file:
            file.seek(40)
            byte = file.read(1)
            file.seek(40)
            file.write(bytes([byte[0] ^ 1]))
        until(lambda: _status(admin, name) == ("warning", ["refused"]))
        shutil.copy(tmp_path / "whole" / "model.onnx", package / "model.onnx")
        until(lambda: _status(admin, name) == ("affirming", []))

        version = f"tiny/{package.name}"
        ok("reference", "withdraw", "model", version, "-m", "a flaw was found", "--admin", admin)
        until(lambda: infer(node, "tiny", TINY).status != 200)
        until(lambda: _status(admin, name) == ("affirming", []))
        until(lambda: infer(node, "mixed", MIXED).status == 200)
        history = json.loads(ok("node", "show", name, "--json", "--history", "10", "--admin", admin))["results"]
        assert [row["status"] for row in history] == [
            "affirming",
            "contraindicated",
            "affirming",
            "warning",
            "affirming",
        ]
        assert infer(node, "tiny", TINY).status != 200
