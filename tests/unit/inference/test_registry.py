"""Which model answers."""

import numpy as np
import pytest

from agent.errors import PeerError, VerificationError
from agent.inference.package import read_package
from agent.inference.registry import ModelState, Registry, load_model
from tests.support.models import write_orientation, write_tiny


def _load(directory, *external):
    package = read_package(directory)
    try:
        fds = {path: sealed.fd for path, sealed in package.files.items()}
        return load_model(fds, external, sha256=package.sha256, signer="ab" * 32)
    finally:
        package.close()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    def make(version):
        return _load(write_tiny(tmp_path_factory.mktemp("m") / "1", version=version))

    return {version: make(version) for version in ("1.9", "1.10")}


def test_the_highest_version_answers_by_default(loaded):
    """1.10 is above 1.9, in whichever order they came."""
    registry = Registry()
    for version in ("1.10", "1.9"):
        registry.add(loaded[version])
    assert registry.get("tiny").manifest.version == "1.10"
    assert registry.get("tiny", "1.9") is loaded["1.9"]
    assert registry.versions("tiny") == ("1.9", "1.10")
    registry.remove("tiny", "1.10")
    assert registry.get("tiny") is loaded["1.9"]


def test_unknown_and_unready_models_differ(loaded):
    """404 for what nobody knows, 503 with a time to come back for what is on its way."""
    registry = Registry()
    with pytest.raises(PeerError) as unknown:
        registry.get("tiny")
    registry.expect("tiny", "1.9")
    with pytest.raises(PeerError) as loading:
        registry.get("tiny")
    registry.add(loaded["1.9"])
    with pytest.raises(PeerError) as version:
        registry.get("tiny", "7")
    assert (unknown.value.status, loading.value.status, version.value.status) == (404, 503, 404)
    assert loading.value.retry_after_s is not None


def test_ready_only_when_all_that_is_expected_answers(loaded):
    """Loading and failed models keep readiness away; the reason is kept."""
    registry = Registry()
    assert registry.ready
    registry.expect("tiny", "1.9")
    assert not registry.ready
    registry.add(loaded["1.9"])
    assert registry.ready
    registry.fail("other", "1", "file-digest")
    assert not registry.ready
    assert registry.states()["other", "1"] == (ModelState.UNAVAILABLE, "file-digest")
    registry.remove("other", "1")
    registry.remove("other", "1")
    assert registry.ready


def test_a_model_that_is_loaded_again_goes_on_answering(loaded):
    """A reload on its way does not take the old one away, a failed one does."""
    registry = Registry()
    registry.add(loaded["1.9"])
    registry.expect("tiny", "1.9")
    assert registry.get("tiny") is loaded["1.9"]
    registry.fail("tiny", "1.9", "file-digest")
    with pytest.raises(PeerError):
        registry.get("tiny")


def test_a_version_that_loads_does_not_shadow_one_that_answers(loaded):
    """The default is the highest of those that are ready."""
    registry = Registry()
    registry.add(loaded["1.9"])
    registry.expect("tiny", "1.10")
    assert registry.get("tiny") is loaded["1.9"]


def test_a_model_is_loaded_from_what_was_handed_over(tmp_path):
    """Labels and external data come from sealed files, which may be closed once the model is there."""
    assert _load(write_orientation(tmp_path / "1")).labels == ("0", "90", "180", "270")
    external = _load(write_tiny(tmp_path / "2", external=True), "weights/data.bin")
    x = np.ones((1, 64), np.float32)
    plain = _load(write_tiny(tmp_path / "3"))
    np.testing.assert_array_equal(external.session.run({"x": x})["y"], plain.session.run({"x": x})["y"])


def test_what_was_not_handed_over_is_missed(tmp_path):
    """External data, label file or graph that did not come is a named error."""
    with pytest.raises(VerificationError, match=r"missing-file: other\.bin"):
        _load(write_tiny(tmp_path / "1"), "other.bin")
    (tmp_path / "1" / "model.onnx").unlink()
    with pytest.raises(VerificationError, match="missing-file"):
        _load(tmp_path / "1")


@pytest.mark.parametrize("labels", [b"\xff", b"x" * ((1 << 20) + 1)])
def test_label_files_have_limits(tmp_path, labels):
    """Labels are UTF-8 text of limited size."""
    directory = write_tiny(tmp_path / "1", labels="labels.txt")
    (directory / "labels.txt").write_bytes(labels)
    with pytest.raises(VerificationError, match="labels"):
        _load(directory)
