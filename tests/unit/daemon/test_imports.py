"""What the control plane leaves to other processes."""

import subprocess
import sys

import pytest

_NAMES = "import sys, agent.cli.run, agent.daemon.main; print(*sys.modules)"


@pytest.fixture(scope="module")
def modules():
    done = subprocess.run([sys.executable, "-c", _NAMES], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", ["numpy", "PIL", "simplejpeg", "onnx", "onnxruntime", "regorus", "opa_client"])
def test_the_agent_does_not_load_what_only_other_processes_run(modules, name):
    """What it has not loaded takes no memory in it, and can't be attacked in it."""
    assert "agent.daemon.main" in modules
    assert name not in modules
