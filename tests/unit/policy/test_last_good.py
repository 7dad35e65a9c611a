"""The last good policy survives, whole or not at all."""

import pytest

from agent.errors import HostError
from agent.policy import last_good
from agent.policy.last_good import LAST_GOOD_FILE, commit, load_last_good, stage


def save_last_good(directory, content):
    stage(directory, LAST_GOOD_FILE, content)
    commit(directory, LAST_GOOD_FILE)


def test_the_last_one_saved_is_loaded(tmp_path) -> None:
    """A save replaces the one before; only its owner may read it."""
    assert load_last_good(tmp_path) is None
    save_last_good(tmp_path, b"one")
    save_last_good(tmp_path, b"two")
    assert load_last_good(tmp_path) == b"two"
    assert (tmp_path / LAST_GOOD_FILE).stat().st_mode & 0o777 == 0o600


def test_a_save_that_was_cut_short_does_not_count(tmp_path) -> None:
    """What a crash left beside the file is not read, and does not stop the next save."""
    save_last_good(tmp_path, b"one")
    (tmp_path / f"{LAST_GOOD_FILE}.new").write_bytes(b"tw")
    assert load_last_good(tmp_path) == b"one"
    save_last_good(tmp_path, b"two")
    assert load_last_good(tmp_path) == b"two"


def test_a_link_is_not_followed(tmp_path) -> None:
    """A link in the place of the new file cannot redirect the write."""
    (tmp_path / f"{LAST_GOOD_FILE}.new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="cannot be kept"):
        save_last_good(tmp_path, b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_what_was_not_staged_cannot_be_committed(tmp_path) -> None:
    """Without a staged file a commit is the host's error, and what is in force stays."""
    save_last_good(tmp_path, b"one")
    with pytest.raises(HostError, match="cannot be kept"):
        commit(tmp_path, LAST_GOOD_FILE)
    assert load_last_good(tmp_path) == b"one"


def test_what_cannot_be_read_is_the_hosts_error(tmp_path, monkeypatch) -> None:
    """A directory in its place, no directory at all, or a file too large for a bundle."""
    with pytest.raises(HostError):
        save_last_good(tmp_path / "nowhere", b"x")
    monkeypatch.setattr(last_good, "MAX_BUNDLE_BYTES", 2)
    save_last_good(tmp_path, b"xyz")
    with pytest.raises(HostError, match="over"):
        load_last_good(tmp_path)
    (tmp_path / LAST_GOOD_FILE).unlink()
    (tmp_path / LAST_GOOD_FILE).mkdir()
    with pytest.raises(HostError, match="cannot be read"):
        load_last_good(tmp_path)
