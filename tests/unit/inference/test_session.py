"""Sessions on real models: what goes in, what comes out, what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agent.errors import PeerError, VerificationError
from agent.inference.manifest import ModelManifest, TensorModality
from agent.inference.package import MODEL_FILE, read_package
from agent.inference.preprocess import image_tensor
from agent.inference.session import Session
from agent.isolation.memfd import map_sealed
from agent.records import TensorSpec
from tests.support.models import magika_features, page, tiny_graph, write_magika, write_orientation, write_tiny


def _open(directory):
    package = read_package(directory)
    try:
        manifest = package.manifest()
        externals = {
            path: map_sealed(sealed.fd) for path, sealed in package.files.items() if path.startswith("weights/")
        }
        return Session(package.read(MODEL_FILE), externals, manifest)
    finally:
        package.close()


@pytest.fixture(scope="module")
def orientation(tmp_path_factory):
    return _open(write_orientation(tmp_path_factory.mktemp("orientation") / "1"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return _open(write_tiny(tmp_path_factory.mktemp("tiny") / "1"))


@pytest.mark.parametrize(("turns", "expected"), [(0, 0), (1, 3), (2, 2), (3, 1)])
def test_page_is_classified_right_at_every_rotation(orientation, turns, expected):
    """A real image model, fed through the manifest's preprocessing, tells which way up a real page is."""
    image = orientation.manifest.image
    outputs = orientation.run({"x": image_tensor(image, "FP32", [page(turns)])})
    assert outputs["fetch_name_0"].shape == (1, 4)
    assert int(outputs["fetch_name_0"].argmax()) == expected


def test_batch_equals_single_requests(orientation):
    """Several pictures in one request answer as each alone."""
    image = orientation.manifest.image
    both = {"x": image_tensor(image, "FP32", [page(0), page(2)])}
    assert orientation.batch(both) == 2
    together = orientation.run(both)["fetch_name_0"]
    alone = orientation.run({"x": image_tensor(image, "FP32", [page(2)])})["fetch_name_0"]
    np.testing.assert_allclose(together[1:], alone, rtol=1e-4, atol=1e-6)


def test_magika_names_this_file_python(tmp_path):
    """A real model that is no image model classifies real bytes."""
    session = _open(write_magika(tmp_path / "1"))
    labels = (tmp_path / "1" / "labels.txt").read_text().split()
    outputs = session.run({"bytes": magika_features(Path(__file__).read_bytes())})
    assert labels[int(outputs["target_label"].argmax())] == "python"


def test_external_data_comes_from_memory(tiny, tmp_path, monkeypatch):
    """A model with external data answers as the one without, though its files are out of reach."""
    session_dir = write_tiny(tmp_path / "1", external=True)
    monkeypatch.chdir("/")
    external = _open(session_dir)
    x = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    np.testing.assert_array_equal(external.run({"x": x})["y"], tiny.run({"x": x})["y"])


def test_external_data_is_never_read_from_the_working_directory(tmp_path, monkeypatch):
    """A location that was not handed over does not load, even where a file of that name lies about."""
    model, data = tiny_graph(location="data.bin")
    (tmp_path / "data.bin").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    manifest = ModelManifest("tiny", "1", (TensorSpec("x", "FP32", (-1, 64)),), (TensorSpec("y", "FP32", (-1, 10)),))
    with pytest.raises(VerificationError, match="model-load"):
        Session(model.SerializeToString(), {}, manifest)


@pytest.mark.parametrize(
    ("inputs", "reason", "text"),
    [
        ({}, "input", "inputs[x]: missing"),
        ({"x": np.zeros((1, 64), np.float64)}, "datatype", "inputs[x]: is FP64"),
        ({"x": np.zeros((1, 63), np.float32)}, "shape", "inputs[x]: is [1, 63]"),
        ({"x": np.zeros((64,), np.float32)}, "shape", "inputs[x]: is [64]"),
        ({"x": np.zeros((0, 64), np.float32)}, "shape", "inputs[x]: is [0, 64]"),
        ({"x": np.full((1, 64), np.nan, np.float32)}, "value", "NaN"),
        ({"x": np.full((1, 64), -np.inf, np.float32)}, "value", "infinite"),
        ({"x": np.zeros((1, 64), np.float32), "z": np.zeros(1)}, "input", "inputs[z]: the model has no such"),
    ],
)
def test_wrong_inputs_are_refused_with_their_place(tiny, inputs, reason, text):
    """What the manifest does not promise never reaches onnxruntime, and the caller is told what and where."""
    with pytest.raises(PeerError) as caught:
        tiny.run(inputs)
    assert caught.value.status == 400
    assert caught.value.reason == reason
    assert text in str(caught.value)


def test_unknown_output_is_refused(tiny):
    """A wanted output that the model does not have is the client's error."""
    with pytest.raises(PeerError, match=r"outputs\[nope\]"):
        tiny.run({"x": np.zeros((1, 64), np.float32)}, ["nope"])


def test_values_outside_the_range_are_refused(tmp_path):
    """A range in the manifest holds for every element."""
    session = _open(write_tiny(tmp_path / "1", modality={"kind": "tensor", "ranges": {"x": {"low": -1, "high": 1}}}))
    x = np.zeros((2, 64), np.float32)
    session.run({"x": x})
    x[1, 63] = 1.5
    with pytest.raises(PeerError, match=r"-1\.\.1"):
        session.run({"x": x})


def test_nonfinite_values_pass_where_the_manifest_allows_them(tmp_path):
    """A model that wants NaN gets it."""
    session = _open(write_tiny(tmp_path / "1", modality={"kind": "tensor", "allow_nonfinite": True}))
    assert np.isnan(session.run({"x": np.full((1, 64), np.nan, np.float32)})["y"]).all()


def _session(nodes, inputs, outputs, manifest):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Session(model.SerializeToString(), {}, manifest)


def test_text_goes_in_and_out_as_bytes():
    """BYTES inputs are text for the model; its text comes back as bytes; what is not UTF-8 is refused."""
    info = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n", 2]) for name in "xy"]
    spec = (TensorSpec("x", "BYTES", (-1, 2)),), (TensorSpec("y", "BYTES", (-1, 2)),)
    session = _session([helper.make_node("Identity", ["x"], ["y"])], info[:1], info[1:], ModelManifest("t", "1", *spec))
    text = np.array([["grüße".encode(), b""]], dtype=object)
    assert session.run({"x": text})["y"].tolist() == text.tolist()
    with pytest.raises(PeerError, match="UTF-8"):
        session.run({"x": np.array([[b"\xff", b""]], dtype=object)})


def test_shapes_that_do_not_go_together_are_the_clients_error():
    """Inputs that pass one by one but can't be computed together are a 400, without the graph's inner names."""
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{name}"]) for name in "abc"}
    manifest = ModelManifest(
        "t", "1", (TensorSpec("a", "FP32", (-1,)), TensorSpec("b", "FP32", (-1,))), (TensorSpec("c", "FP32", (-1,)),)
    )
    node = helper.make_node("Add", ["a", "b"], ["c"], name="secret_node")
    session = _session([node], [info["a"], info["b"]], [info["c"]], manifest)
    with pytest.raises(PeerError) as caught:
        session.run({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)})
    assert caught.value.status == 400
    assert "secret_node" not in str(caught.value)


def test_output_that_breaks_the_manifest_is_not_answered():
    """A model that gives another shape than it promised is a verification error."""
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    manifest = ModelManifest("t", "1", (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (3,)),))
    session = _session([helper.make_node("Identity", ["x"], ["y"])], info[:1], info[1:], manifest)
    session.run({"x": np.zeros(3, np.float32)})
    with pytest.raises(VerificationError, match="model-output"):
        session.run({"x": np.zeros(4, np.float32)})


def test_graph_and_manifest_must_agree():
    """A manifest of another interface does not get a session."""
    manifest = ModelManifest("t", "1", (TensorSpec("q", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),))
    with pytest.raises(VerificationError, match="model-io"):
        Session(tiny_graph()[0].SerializeToString(), {}, manifest)


@pytest.mark.parametrize("model", [b"", b"not a model", b"ORTM" + b"\0" * 64, onnx.ModelProto().SerializeToString()])
def test_bytes_that_are_no_onnx_model_do_not_load(model):
    """Neither rubbish nor onnxruntime's own format, which the gate has never seen, becomes a session."""
    manifest = ModelManifest("t", "1", (), (), TensorModality())
    with pytest.raises(VerificationError):
        Session(model, {}, manifest)


def test_onnxruntime_is_not_imported_with_telemetry_on():
    """Without the switch in the environment the door stays shut, and onnxruntime unloaded."""
    code = (
        "import sys\n"
        "try:\n    import agent.inference.session\n"
        "except Exception as error:\n    print(type(error).__name__, 'onnxruntime' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["HostError", "False"]


def test_loading_and_running_leaves_no_file(tmp_path, monkeypatch):
    """Loading and running writes nothing: the plain model would otherwise lie on the disk."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    session = _open(write_tiny(tmp_path / "1"))
    session.run({"x": np.zeros((1, 64), np.float32)})
    assert list((tmp_path / "empty").iterdir()) == []
