"""The structural gate against hostile graphs."""

import copy

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agent.errors import VerificationError
from agent.inference import gate
from agent.inference.gate import check_model, graph_specs
from agent.inference.manifest import ModelManifest
from agent.inference.package import read_package
from agent.records import TensorSpec
from tests.support.models import tiny_graph, write_magika, write_orientation

MANIFEST = ModelManifest("t", "1", (TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
LOCATION = "weights/data.bin"
INLINE, _ = tiny_graph()
EXTERNAL, DATA = tiny_graph(location=LOCATION)
SIZES = {LOCATION: len(DATA)}


def _refusal(model, sizes=SIZES, manifest=MANIFEST):
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(VerificationError) as caught:
        check_model(data, sizes, manifest)
    return caught.value.check


@pytest.mark.parametrize(("write", "nodes"), [(write_orientation, 115), (write_magika, 95)])
def test_real_models_pass(tmp_path, write, nodes):
    """Models of two makers pass, and the report counts what is in them."""
    package = read_package(write(tmp_path / "1"))
    report = check_model(package.read("model.onnx"), {}, package.manifest())
    assert report.nodes == nodes
    assert report.parameters > 100_000
    assert report.operators[":Conv"] >= 1


def test_external_data_inside_the_package_passes():
    """External data in a listed file is named in the report."""
    report = check_model(EXTERNAL.SerializeToString(), SIZES, MANIFEST)
    assert report.external == (LOCATION,)
    assert report.parameters == 64 * 32 + 32 + 32 * 10 + 10


def test_interface_of_the_graph():
    """Inputs and outputs come in the protocol's words, open dimensions as -1."""
    assert graph_specs(INLINE) == (MANIFEST.inputs, MANIFEST.outputs)


def _changed(change, model=INLINE):
    model = copy.deepcopy(model)
    change(model)
    return model


def _subgraphs(depth):
    graph = helper.make_graph([], "leaf", [], [])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], [], then_branch=graph, else_branch=helper.make_graph([], "e", [], []))
        graph = helper.make_graph([node], "g", [], [])
    return lambda model: model.graph.node.extend(graph.node)


def _node(*arguments, **attributes):
    return lambda model: model.graph.node.append(helper.make_node(*arguments, **attributes))


def _function(domain, name, *called):
    nodes = [helper.make_node(callee, ["a"], ["b"], domain=where) for where, callee in called]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])


def _functions(*functions, call=("own", "f")):
    def change(model):
        model.functions.extend(functions)
        model.graph.node.append(helper.make_node(call[1], ["x"], ["z"], domain=call[0]))

    return change


def _laughs(levels, width):
    """Functions that each call the next one many times: a few bytes that stand for width ** levels nodes."""
    functions = [_function("own", f"f{level}", *[("own", f"f{level + 1}")] * width) for level in range(levels)]
    return _functions(*functions, _function("own", f"f{levels}", ("", "Relu")), call=("own", "f0"))


def _initializer(**fields):
    def change(model):
        tensor = model.graph.initializer.add(name="t", data_type=fields.pop("data_type", TensorProto.FLOAT))
        for key, value in fields.items():
            if isinstance(value, list):
                getattr(tensor, key).extend(value)
            else:
                setattr(tensor, key, value)

    return change


def _attribute_tensor(model):
    tensor = copy.deepcopy(EXTERNAL.graph.initializer[0])
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))


def _sparse(dims):
    def change(model):
        values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
        indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dims))

    return change


STRUCTURE = [
    ("ir-version", lambda m: setattr(m, "ir_version", 2)),
    ("ir-version", lambda m: setattr(m, "ir_version", 99)),
    ("opset", lambda m: setattr(m.opset_import[0], "version", 999)),
    ("opset", lambda m: setattr(m.opset_import[0], "version", -1)),
    ("opset", lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 17))),
    ("training", lambda m: m.training_info.add()),
    ("operator", _node("Evil", ["x"], ["z"])),
    ("operator", _node("Relu", ["x"], ["z"], domain="evil.corp")),
    ("operator", _node("EPContext", ["x"], ["z"], domain="com.microsoft")),
    ("operator", _node("", ["x"], ["z"])),
    ("operator", lambda m: m.graph.node.append(onnx.NodeProto(op_type="Relu", overload="x"))),
    ("operands", _node("Concat", ["x"] * (gate.MAX_OPERANDS + 1), ["z"])),
    ("name-length", _node("Relu", ["x" * (gate.MAX_NAME_BYTES + 1)], ["z"])),
    ("attributes", _node("Relu", ["x"], ["z"], **{f"a{n}": n for n in range(gate.MAX_ATTRIBUTES + 1)})),
    ("attributes", _node("Relu", ["x"], ["z"], big=[1] * (gate.MAX_ATTRIBUTE_VALUES + 1))),
    ("depth", _subgraphs(gate.MAX_DEPTH + 1)),
    ("node-count", lambda m: m.graph.node.extend([onnx.NodeProto(op_type="Relu")] * gate.MAX_NODES)),
    ("functions", _functions(_function("", "Relu", ("", "Neg")), call=("", "Relu"))),
    ("functions", _functions(_function("ai.onnx", "Relu", ("", "Neg")), call=("", "Relu"))),
    ("functions", _functions(_function("com.microsoft", "Gelu", ("", "Neg")), call=("", "Relu"))),
    ("functions", _functions(_function("own", "f", ("own", "f")))),
    ("functions", _functions(_function("own", "f", ("own", "g")), _function("own", "g", ("own", "f")))),
    ("functions", _functions(_function("own", "f", ("", "Relu")), _function("own", "f", ("", "Neg")))),
    ("functions", _functions(*[_function("own", f"f{n}") for n in range(gate.MAX_FUNCTIONS + 1)])),
    ("functions", _laughs(gate.MAX_DEPTH + 2, 1)),
    ("node-count", _laughs(6, 10)),
    ("operator", _functions(_function("own", "f", ("evil", "g")))),
]

TENSORS = [
    ("tensor-size", _initializer(dims=[1 << 30], raw_data=b"\0" * 4)),
    ("tensor-size", _initializer(dims=[2], raw_data=b"\0" * 9)),
    ("tensor-size", _initializer(dims=[3], float_data=[1.0])),
    ("tensor-size", _initializer(dims=[1], float_data=[1.0], int32_data=[1])),
    ("tensor-size", _initializer(data_type=TensorProto.STRING, dims=[5], string_data=[b"a"])),
    ("tensor-shape", _initializer(dims=[-1])),
    ("tensor-shape", _initializer(dims=[1 << 40])),
    ("tensor-shape", _initializer(dims=[1 << 62, 1 << 62])),
    ("tensor-shape", _initializer(dims=[1] * 17)),
    ("tensor-type", _initializer(data_type=0, dims=[1], raw_data=b"")),
    ("tensor-type", _initializer(data_type=999, dims=[1], raw_data=b"")),
    ("tensor-type", _initializer(data_type=TensorProto.COMPLEX64, dims=[1], raw_data=b"\0" * 8)),
    ("external-data", _attribute_tensor),
    ("tensor-shape", _sparse([1 << 40])),
    ("tensor-shape", _sparse([-5])),
]

INTERFACE = [
    ("model-inputs", lambda m: setattr(m.graph.input[0], "name", "q")),
    ("model-inputs", lambda m: m.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))),
    ("model-inputs", lambda m: m.graph.input.append(m.graph.input[0])),
    ("model-inputs", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE)),
    ("model-inputs", lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 63)),
    ("model-inputs", lambda m: m.graph.input[0].type.tensor_type.shape.dim.add()),
    ("model-inputs", lambda m: m.graph.input[0].type.tensor_type.ClearField("shape")),
    ("model-inputs", lambda m: m.graph.input[0].type.sequence_type.elem_type.tensor_type.SetInParent()),
    ("model-outputs", lambda m: m.graph.output.pop()),
    ("model-outputs", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", TensorProto.INT64)),
    ("model-outputs", lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 11)),
]


@pytest.mark.parametrize(("check", "change"), STRUCTURE + TENSORS + INTERFACE)
def test_hostile_graphs_are_refused_by_name(check, change):
    """Each way in which a graph may attack what reads it has a check of its own."""
    assert _refusal(_changed(change)) == check


def test_the_limits_themselves_pass():
    """One less than too much is accepted: the checks above fail for their reason alone."""
    for change in (
        _subgraphs(gate.MAX_DEPTH),
        _laughs(4, 10),
        _functions(_function("own", "f", ("", "Relu"))),
        _initializer(dims=[2], raw_data=b"\0" * 8),
        _initializer(data_type=TensorProto.INT4, dims=[3], raw_data=b"\0" * 2),
        _initializer(dims=[0]),
        lambda m: m.opset_import.append(helper.make_opsetid("unused.domain", 1)),
    ):
        assert check_model(_changed(change).SerializeToString(), SIZES, MANIFEST).nodes >= 3


def _external(**values):
    def change(model):
        tensor = model.graph.initializer[0]
        entries = {entry.key: entry.value for entry in tensor.external_data} | values
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _external(location="/etc/passwd"),
        _external(location="../secret"),
        _external(location="weights/../../secret"),
        _external(location="weights/./data.bin"),
        _external(location="./weights/data.bin"),
        _external(location="weights//data.bin"),
        _external(location="weights/other.bin"),
        _external(location=""),
        _external(location=None),
        _external(location="*/_ORT_MEM_ADDR_/*", offset="4096"),
        _external(location="model.onnx"),
        _external(location=LOCATION + "\0"),
        _external(location=LOCATION + "\n"),
        _external(offset="-1"),
        _external(offset="1e3"),
        _external(offset="0x10"),
        _external(offset="4"),
        _external(offset=str(len(DATA))),
        _external(offset=str(1 << 63)),
        _external(offset="9" * 400),
        _external(length="0"),
        _external(length=str(len(DATA))),
        _external(basepath="/"),
        lambda m: m.graph.initializer[0].external_data.add(key="location", value="../secret"),
        lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 20),
    ],
)
def test_external_data_stays_inside_listed_files(change):
    """No location, offset or length reaches past a listed file; memory addresses in disguise neither."""
    model = _changed(change, EXTERNAL)
    sizes = {LOCATION: 64 * 32 * 4, "*/_ORT_MEM_ADDR_/*": 1 << 40, "weights/../../secret": 1 << 30}
    only_first = _changed(lambda m: [m.graph.initializer.pop() for _ in range(3)], model)
    assert _refusal(only_first, sizes) == "external-data"


def test_external_data_by_flag_alone_is_refused():
    """A tensor that says its data lies elsewhere but not where."""
    assert _refusal(_changed(_initializer(dims=[1], data_location=TensorProto.EXTERNAL))) == "external-data"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        b"\x3a" + b"\xff" * 9 + b"\x01",
        INLINE.SerializeToString()[:-1],
        INLINE.SerializeToString()[: len(INLINE.SerializeToString()) // 2],
        b"",
        b"\x08\x09",
        b"ORTM" * 8,
    ],
)
def test_bytes_that_are_no_model_are_refused(data):
    """Rubbish, truncation and emptiness all are onnx-format."""
    assert _refusal(data) == "onnx-format"


@pytest.mark.parametrize("word", [b"Relu", b"weights/data.bin", b"location", b"\x01x"])
def test_text_that_is_not_utf_8_is_refused(word):
    """Protobuf hands such text over as bytes; it is refused wherever it stands."""
    damaged = EXTERNAL.SerializeToString().replace(word, word[:-1] + b"\xff")
    assert _refusal(damaged) == "text-encoding"


def test_nesting_past_the_parsers_own_limit_is_refused():
    """Subgraphs a hundred deep end in the parser, by name, not in the stack."""
    inner = b""
    for _ in range(60):
        attribute = b"\x0a\x01a" + _field(6, inner)
        inner = _field(1, _field(5, attribute))
    assert _refusal(b"\x08\x09" + _field(7, inner)) in {"onnx-format", "opset", "depth"}


def _field(number, payload):
    size, varint = len(payload), b""
    while size >= 0x80:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + payload


def test_a_manifest_may_fix_what_the_graph_leaves_open():
    """A model with an open batch may be offered for batches of one alone."""
    fixed = ModelManifest("t", "1", (TensorSpec("x", "FP32", (1, 64)),), (TensorSpec("y", "FP32", (1, 10)),))
    assert check_model(INLINE.SerializeToString(), {}, fixed).nodes == 3


def test_an_input_filled_by_an_initializer_is_not_offered():
    """Weights that are listed as inputs, as old exporters do, can't be set by a client."""
    model = _changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [64, 32])))
    assert check_model(model.SerializeToString(), {}, MANIFEST).nodes == 3
    more = ModelManifest("t", "1", (*MANIFEST.inputs, TensorSpec("w1", "FP32", (64, 32))), MANIFEST.outputs)
    assert _refusal(model, manifest=more) == "model-inputs"


@settings(deadline=None)
@given(st.data())
def test_any_damage_is_refused_by_name_or_harmless(data):
    """Flip, cut or insert bytes anywhere in a model file: a report or a VerificationError, nothing else."""
    content = bytearray(EXTERNAL.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                content[position] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[position : position + data.draw(st.integers(1, 8))]
            case _:
                content[position:position] = data.draw(st.binary(min_size=1, max_size=8))
    try:
        report = check_model(bytes(content), SIZES, MANIFEST)
    except VerificationError as error:
        assert error.check  # noqa: PT017 -- which check it is depends on the damage
    else:
        assert report.nodes <= gate.MAX_NODES


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_by_name(data):
    """Nothing leaks from the parser."""
    with pytest.raises(VerificationError):
        check_model(data, {}, MANIFEST)
