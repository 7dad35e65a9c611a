"""What the control plane leaves to other processes."""

import subprocess
import sys

import pytest

from agent.daemon.main import PRELOAD

_AGENT = ("agent.cli.run", "agent.daemon.main")


def _loaded(names):
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    environment = {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *names], check=True, capture_output=True, text=True, env=environment
    )
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def agent_modules():
    return _loaded(_AGENT)


@pytest.fixture(scope="module")
def zygote_modules():
    return _loaded(("agent.isolation.zygote", *PRELOAD))


@pytest.mark.parametrize("name", ["numpy", "PIL", "simplejpeg", "onnx", "onnxruntime", "regorus", "opa_client"])
def test_the_agent_does_not_load_what_only_other_processes_run(agent_modules, name):
    """What it has not loaded takes no memory in it, and can't be attacked in it."""
    assert agent_modules.issuperset(_AGENT)
    assert name not in agent_modules


@pytest.mark.parametrize("name", ["agent.inference.inspector", "onnx", "google.protobuf", "opa_client", "requests"])
def test_the_zygote_does_not_load_what_few_children_run(zygote_modules, name):
    """The graph parser and the OPA client are imported where they are used; all other children would carry them."""
    assert name not in zygote_modules


@pytest.mark.parametrize(
    "name", ["agent.isolation.supervisor", "tpm2_pytss", "structlog", "prometheus_client", "psutil", "watchdog"]
)
def test_the_zygote_does_not_load_what_only_the_agent_runs(zygote_modules, name):
    """Each child would carry it, and could use it."""
    assert zygote_modules.issuperset(PRELOAD)
    assert name not in zygote_modules
