"""Building: reproducible, and honest about what it leaves out."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from agent.errors import ConfigError, VerificationError
from agent.policy import build as rules
from agent.policy.build import build
from agent.policy.bundle import Bundle, read_archive


@pytest.fixture
def folders(tmp_path):
    rego, policies = tmp_path / "rego", tmp_path / "policies"
    (rego / "edgewarden").mkdir(parents=True)
    (policies / "roles").mkdir(parents=True)
    (rego / ".manifest").write_text('{"roots":["edgewarden"]}')
    (rego / "edgewarden/authz.rego").write_text("package edgewarden.authz\n")
    (rego / "edgewarden/authz_test.rego").write_text("package edgewarden.authz_test\n")
    (policies / ".manifest").write_text('{"roots":["roles"]}')
    (policies / "roles/data.yaml").write_text("ml: [infer]\n")
    (policies / "roles/schema.json").write_text('{"type":"object"}')
    (policies / "roles/.hidden").write_text("x")
    return rego, policies


def test_both_folders_make_one_bundle(folders) -> None:
    """Modules without their tests, one data.json, the schemas, and all roots."""
    read = read_archive(build(folders[0], folders[1], "7"))
    assert sorted(read) == [".manifest", "data.json", "rego/edgewarden/authz.rego", "roles/schema.json"]
    bundle = Bundle.from_bytes(build(folders[0], folders[1], "7"))
    assert (bundle.data, bundle.roots, bundle.revision) == ({"roles": {"ml": ["infer"]}}, ("edgewarden", "roles"), "7")


def test_the_same_sources_give_the_same_bytes(folders) -> None:
    """Neither time, nor owner, nor the order of files shows in a bundle."""
    first = build(folders[0], folders[1], "7")
    module = folders[0] / "edgewarden/authz.rego"
    text = module.read_text()
    module.unlink()
    module.write_text(text)
    module.chmod(0o600)
    assert build(folders[0], folders[1], "7") == first
    assert build(folders[0], folders[1], "8") != first
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(first))) as packed:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in packed} == {(0, 0, 0, "", 0o644)}


def test_roots_of_the_folders_are_disjoint(folders) -> None:
    """A root that both folders claim, or none that limits one, is refused."""
    (folders[1] / ".manifest").write_text('{"roots":["edgewarden/data"]}')
    with pytest.raises(VerificationError, match="overlap"):
        build(folders[0], folders[1], "7")
    (folders[1] / ".manifest").unlink()
    with pytest.raises(VerificationError, match="overlap"):
        build(folders[0], folders[1], "7")


def test_data_beside_code_is_refused(folders) -> None:
    """Data has one place."""
    (folders[0] / "data.json").write_text("{}")
    with pytest.raises(VerificationError, match="not beside code"):
        build(folders[0], folders[1], "7")


def test_what_is_built_could_be_loaded(folders) -> None:
    """The result passes the reader's checks, so data against its schema refuses the build."""
    (folders[1] / "roles/schema.json").write_text('{"required":["nobody"]}')
    with pytest.raises(VerificationError, match="bundle-schema"):
        build(folders[0], folders[1], "7")


def test_links_and_missing_folders_are_refused(folders) -> None:
    """A link could bring in what nobody reviewed."""
    with pytest.raises(ConfigError, match="not a folder"):
        build(folders[0], folders[1] / "nowhere", "7")
    (folders[0] / "link.rego").symlink_to("/etc/hostname")
    with pytest.raises(VerificationError, match="symbolic link"):
        build(folders[0], folders[1], "7")


def test_a_file_that_cannot_be_read_is_named(folders, monkeypatch) -> None:
    """A disk that fails is reported with the file's path."""

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(ConfigError, match="Input/output"):
        build(folders[0], folders[1], "7")


def test_sources_have_a_limit(folders, monkeypatch) -> None:
    """More source than a bundle may hold is refused while it is read."""
    monkeypatch.setattr(rules, "MAX_UNPACKED_BYTES", 10)
    with pytest.raises(VerificationError, match="over 10 bytes"):
        build(folders[0], folders[1], "7")
