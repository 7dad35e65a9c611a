"""Which model answers."""

import pytest

from agent.errors import PeerError
from agent.inference.package import MODEL_FILE, read_package
from agent.inference.registry import LoadedModel, ModelState, Registry
from agent.inference.session import Session
from tests.support.models import write_tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    def make(version):
        package = read_package(write_tiny(tmp_path_factory.mktemp("m") / "1", version=version))
        manifest = package.manifest()
        session = Session(package.read(MODEL_FILE), {}, manifest)
        return LoadedModel(session, manifest, package.sha256, "ab" * 32)

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
