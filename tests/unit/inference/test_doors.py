"""What the control plane may not have in its process."""

import subprocess
import sys


def test_the_agents_side_imports_neither_runtime_nor_graph_parser():
    """Reading, verifying, storing and having inspected needs no onnxruntime, onnx or protobuf in the agent."""
    code = (
        "import sys\n"
        "import agent.inference.package, agent.inference.signing, agent.inference.store, agent.inference.inspection\n"
        "import agent.cli.model\n"
        "print([name for name in ('onnx', 'onnxruntime', 'google.protobuf') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
