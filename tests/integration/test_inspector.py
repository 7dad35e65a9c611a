"""The inspector in its real sandbox, on real and hostile models."""

import json

import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from agent.cli.model import command
from agent.daemon.main import PRELOAD
from agent.errors import VerificationError
from agent.inference.inspection import inspect
from agent.inference.package import read_package
from agent.isolation.sandbox import probe
from agent.isolation.supervisor import Zygote
from tests.support.models import new_key, public_pem, sign_directory, write_magika, write_orientation, write_tiny

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def zygote():
    zygote = Zygote.start(PRELOAD, sandbox_required=False)
    yield zygote
    zygote.close()


async def _inspect(zygote, directory, **options):
    package = read_package(directory)
    try:
        return await inspect(zygote, package, **options)
    finally:
        package.close()


@pytest.mark.parametrize("write", [write_orientation, write_magika])
async def test_real_models_pass(zygote, tmp_path, write):
    """A real model passes the gate and runs once inside the sandbox."""
    report = await _inspect(zygote, write(tmp_path / "1"))
    assert report.gate.nodes > 90
    assert report.outputs[0].shape[0] == 1
    assert report.load_us > 0


async def test_external_data_passes(zygote, tmp_path):
    """External data is found in sealed memory, and the report says which files it takes."""
    report = await _inspect(zygote, write_tiny(tmp_path / "1", external=True))
    assert report.gate.external == ("weights/data.bin",)


async def test_as_many_files_as_a_package_may_have(zygote, tmp_path):
    """A package of 256 files is handed over, though a message holds fewer descriptors."""
    directory = write_tiny(tmp_path / "1")
    for index in range(254):
        (directory / f"data{index}").write_bytes(b"x")
    assert (await _inspect(zygote, directory)).gate.external == ()


async def test_refusal_comes_through_with_its_check(zygote, tmp_path):
    """What the gate refuses inside the sandbox is refused by name outside."""
    directory = write_tiny(tmp_path / "1")
    (directory / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(VerificationError) as caught:
        await _inspect(zygote, directory)
    assert caught.value.check == "onnx-format"


def _bomb(directory, nodes, outputs):
    write_tiny(directory, inputs=[{"name": "x", "datatype": "INT64", "shape": [1]}], outputs=outputs)
    graph = helper.make_graph(
        nodes,
        "bomb",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    return directory


_OUT = [{"name": "y", "datatype": "INT64", "shape": [-1]}]


async def test_memory_bomb_ends_with_the_inspector(zygote, tmp_path):
    """A graph of a few bytes that makes a tensor of a terabyte is refused; the next model is inspected as ever."""
    shape = helper.make_node("Constant", [], ["s"], value_ints=[1 << 37])
    fill = helper.make_node("ConstantOfShape", ["s"], ["c"], value=helper.make_tensor("v", TensorProto.INT64, [1], [1]))
    add = helper.make_node("Add", ["c", "x"], ["y"])
    with pytest.raises(VerificationError):
        await _inspect(zygote, _bomb(tmp_path / "1", [shape, fill, add], _OUT))
    assert await _inspect(zygote, write_tiny(tmp_path / "2"))


async def test_endless_model_is_killed_at_the_deadline(zygote, tmp_path):
    """A loop that does not come to an end costs its inspector, not the node."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Add", ["a", "a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", TensorProto.INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", TensorProto.INT64, [1]),
        ],
    )
    nodes = [
        helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True])),
        helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body),
    ]
    with pytest.raises(VerificationError) as caught:
        await _inspect(zygote, _bomb(tmp_path / "1", nodes, _OUT), deadline_s=3.0)
    assert caught.value.check == "inspector"


async def test_a_million_nodes_do_not_harm_the_agent(zygote, tmp_path):
    """Two bytes a node on the wire, a hundred in memory: refused by count or by the memory limit."""
    directory = write_tiny(tmp_path / "1")
    graph = b"\x0a\x00" * 20_000_000
    size = len(graph)
    varint = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21 & 0x7F])
    (directory / "model.onnx").write_bytes(b"\x08\x09\x3a" + varint + graph)
    with pytest.raises(VerificationError) as caught:
        await _inspect(zygote, directory)
    assert caught.value.check in {"node-count", "inspector", "onnx-format", "opset"}


@pytest.mark.skipif(bool(probe().missing), reason="the kernel lacks a layer of the sandbox, which the command demands")
def test_verify_inspects_on_demand(tmp_path):
    """``edgewarden model verify --inspect`` runs gate and trial in a sandbox of its own."""
    key = new_key()
    (tmp_path / "pub.pem").write_bytes(public_pem(key))
    directory = sign_directory(write_tiny(tmp_path / "tiny", external=True), key)
    arguments = ["verify", str(directory), "--trust", str(tmp_path / "pub.pem"), "--inspect", "--json"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["inspection"]["gate"]["nodes"] == 3
