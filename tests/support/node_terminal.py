"""``edgewarden attest enrol|status|leave`` on a running node, as an operator types it."""

import json
import subprocess
import sys

from tools.demo_node import ROOT

__all__ = ["attest", "enrol", "enrolled", "kept", "status"]


def attest(node, *words, text=""):
    """Run ``edgewarden attest`` as an operator does; returns exit code, output and the last words."""
    where = ("--socket", node.root / "run" / "admin.sock")
    command = [sys.executable, "-m", "agent.cli", "attest", *map(str, (*words, *where))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, input=text, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def enrol(node, controller, *words):
    """Enrol it, in mode push unless words say otherwise; returns what :func:`attest` does."""
    mode = words or ("--mode", "push")
    return attest(node, "enrol", "--token-file", "-", *mode, text=controller.token())


def enrolled(node, controller, *words):
    """Enrol it, which must work."""
    code, _, complaint = enrol(node, controller, *words)
    assert code == 0, complaint


def status(node):
    """Return what ``attest status`` says."""
    code, output, complaint = attest(node, "status", "--json")
    assert code == 0, complaint
    return json.loads(output)


def kept(node):
    """Return what the node has of its enrolment, by the files' names."""
    return {path.name: path.read_bytes() for path in (node.root / "state" / "controller").glob("*")}
