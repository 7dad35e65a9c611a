"""The store: verified before visible, changed in one step."""

import os

import pytest

from agent.errors import ConfigError, HostError, VerificationError
from agent.inference import store as model_store
from agent.inference.package import read_package
from agent.inference.signing import TrustStore
from agent.inference.store import install, list_models, remove
from tests.support.models import CertificateMaker, new_key, sign_directory, write_tiny

KEY = new_key()
TRUST = TrustStore((KEY.public_key(),))


def _package(tmp_path, **options):
    place = tmp_path / f"source{len(list(tmp_path.iterdir()))}" / "tiny"
    return sign_directory(write_tiny(place, **options), KEY)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "models"


def _entries(store):
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.name != ".lock")


def test_an_installed_package_is_the_verified_one(tmp_path, store):
    """What lies in the store has the digest that was verified, and is readable by the agent's user."""
    done = install(_package(tmp_path, external=True), store, TRUST)
    assert done.changed
    assert done.path == store / "tiny" / "1"
    assert read_package(done.path).sha256 == done.sha256
    assert oct(done.path.stat().st_mode & 0o777) == "0o755"
    assert _entries(store) == [
        "tiny",
        "tiny/1",
        "tiny/1/model.onnx",
        "tiny/1/model.sig",
        "tiny/1/model.yaml",
        "tiny/1/weights",
        "tiny/1/weights/data.bin",
    ]


def test_installing_the_same_again_changes_nothing(tmp_path, store):
    """Repeating is no error."""
    source = _package(tmp_path)
    install(source, store, TRUST)
    before = (store / "tiny" / "1").stat().st_ino
    assert not install(source, store, TRUST).changed
    assert (store / "tiny" / "1").stat().st_ino == before


def test_another_content_of_a_version_needs_replace(tmp_path, store):
    """A version means one content, unless the operator says so."""
    first = install(_package(tmp_path), store, TRUST)
    other = _package(tmp_path, seed=8)
    with pytest.raises(ConfigError, match="--replace"):
        install(other, store, TRUST)
    assert read_package(first.path).sha256 == first.sha256
    second = install(other, store, TRUST, replace=True)
    assert read_package(second.path).sha256 == second.sha256 != first.sha256
    assert [entry for entry in _entries(store) if entry.startswith(".")] == []


def test_a_package_that_does_not_verify_never_becomes_visible(tmp_path, store):
    """A stranger's signature leaves the store as it was."""
    install(_package(tmp_path), store, TRUST)
    before = _entries(store)
    with pytest.raises(VerificationError, match="untrusted-key"):
        install(_package(tmp_path, version="2"), store, TrustStore((new_key().public_key(),)))
    assert _entries(store) == before


def test_an_expired_certificate_is_refused_at_the_door_unless_allowed(tmp_path, store):
    """Where an operator is present, dates are demanded; a node that loads later does not stop for them."""
    root = CertificateMaker.root()
    leaf = root.issue("Old", days=1)
    source = write_tiny(tmp_path / "s" / "tiny")
    sign_directory(source, leaf.key, (leaf.certificate,))
    trust = TrustStore(roots=(root.certificate,))
    with pytest.raises(VerificationError, match="certificate-dates"):
        install(source, store, trust)
    assert not install(source, store, trust, allow_expired=True).signer.in_date


def test_a_write_that_fails_leaves_the_old_state(tmp_path, store, monkeypatch):
    """A full disk half-way through leaves neither a new version nor rubbish."""
    install(_package(tmp_path), store, TRUST)
    before = _entries(store)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(HostError, match="No space"):
        install(_package(tmp_path, seed=8), store, TRUST, replace=True)
    assert _entries(store) == before


def test_leftovers_of_a_crash_are_invisible_and_cleaned(tmp_path, store):
    """A half-written directory is no version, and the next change removes it."""
    store.mkdir()
    (store / ".incoming-dead").mkdir()
    (store / ".incoming-dead" / "model.onnx").write_bytes(b"half")
    assert list_models(store) == []
    install(_package(tmp_path), store, TRUST)
    assert not (store / ".incoming-dead").exists()


def test_list_is_in_order_of_versions(tmp_path, store):
    """1.10 comes after 1.9."""
    for version in ("1.10", "1.9"):
        install(_package(tmp_path, version=version), store, TRUST)
    assert [(model.name, model.version) for model in list_models(store)] == [("tiny", "1.9"), ("tiny", "1.10")]
    assert list_models(store)[0].size_bytes > 9000


def test_removing_takes_a_version_and_an_empty_name_away(tmp_path, store):
    """Nothing remains of what was removed; a second removal says that it is not there."""
    install(_package(tmp_path), store, TRUST)
    install(_package(tmp_path, version="2"), store, TRUST)
    remove(store, "tiny", "1")
    assert [model.version for model in list_models(store)] == ["2"]
    remove(store, "tiny", "2")
    assert _entries(store) == []
    with pytest.raises(ConfigError, match="not in"):
        remove(store, "tiny", "2")


@pytest.mark.parametrize(("name", "version"), [("..", "1"), ("a", ".."), ("a/b", "1"), ("", "1"), ("a", "1/../..")])
def test_names_cannot_leave_the_store(store, name, version):
    """A name is never a path."""
    with pytest.raises(ConfigError, match="not a possible"):
        remove(store, name, version)


def test_a_store_that_cannot_be_read_is_the_hosts_error(store):
    """A missing directory is named."""
    with pytest.raises(HostError, match="model store"):
        list_models(store)


def test_exchange_reports_what_the_kernel_said(tmp_path):
    """The one call that Python does not offer keeps its error."""
    with pytest.raises(OSError, match="No such file"):
        model_store._exchange(tmp_path / "a", tmp_path / "b")
