"""Sealed memory files: the digest is of what is in them, and nobody changes it."""

import fcntl
import hashlib
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import IsolationError, VerificationError
from agent.isolation import memfd
from agent.isolation.memfd import CHUNK_BYTES, check_sealed, map_sealed, seal_bytes, seal_file

LIMIT = 8 << 20


def sealed_from(path, name="x", limit=LIMIT):
    with path.open("rb") as file:
        return seal_file(name, file.fileno(), limit)


@given(st.binary(max_size=4096), st.text(max_size=300))
def test_a_sealed_file_is_its_bytes_and_their_digest(data, name):
    """Size, digest and content agree, whatever the name holds: NUL, emoji, 300 characters."""
    sealed = seal_bytes(name, data)
    assert sealed.sha256 == hashlib.sha256(data).hexdigest()
    assert check_sealed(sealed.fd) == sealed.size == len(data)
    assert bytes(map_sealed(sealed.fd)) == data
    sealed.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_file_is_sealed_as_it_was_read(tmp_path, size):
    """A file of any size around the chunk size comes out the same, with its digest."""
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    sealed = sealed_from(tmp_path / "f")
    assert sealed.sha256 == hashlib.sha256(data).hexdigest()
    assert bytes(map_sealed(sealed.fd)) == data
    sealed.close()


def test_a_sealed_file_cannot_be_changed(tmp_path):
    """Writing, growing, shrinking, mapping for writing and unsealing fail, also through a new descriptor."""
    (tmp_path / "f").write_bytes(b"data")
    sealed = sealed_from(tmp_path / "f")
    again = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDWR)
    for fd in (sealed.fd, again):
        for change in (
            lambda fd: os.pwrite(fd, b"x", 0),
            lambda fd: os.truncate(fd, 8),
            lambda fd: os.truncate(fd, 2),
            lambda fd: mmap.mmap(fd, 4),
            lambda fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change(fd)
    os.close(again)
    sealed.close()


def test_a_file_over_the_limit_is_refused(tmp_path):
    """One byte more than the limit is a verification error named size."""
    (tmp_path / "f").write_bytes(b"12345")
    assert sealed_from(tmp_path / "f", limit=5).size == 5
    with pytest.raises(VerificationError) as failure:
        sealed_from(tmp_path / "f", limit=4)
    assert failure.value.check == "size"


@pytest.mark.parametrize("change", [1, -1])
def test_a_file_that_changes_its_size_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    """A writer that appends or truncates between the size and the read is noticed, and nothing is sealed."""
    path = tmp_path / "f"
    path.write_bytes(bytes(1000))
    real = os.memfd_create

    def meanwhile(*args):
        os.truncate(path, 1000 + change)
        return real(*args)

    monkeypatch.setattr(os, "memfd_create", meanwhile)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(VerificationError):
        sealed_from(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_SEAL, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_a_missing_seal_is_refused(missing):
    """A received memory file that lacks any one of the four seals is not believed."""
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, memfd._ALL_SEALS & ~missing)
    with pytest.raises(IsolationError, match="not completely sealed"):
        check_sealed(fd)
    os.close(fd)


def test_what_is_no_memory_file_is_refused(tmp_path):
    """A file, a pipe, a device, and a number that is not open are errors of ours."""
    (tmp_path / "f").write_bytes(b"x")
    file = os.open(tmp_path / "f", os.O_RDONLY)
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDONLY)
    for fd in (file, reader, null, 2**20):
        with pytest.raises(IsolationError):
            map_sealed(fd)
    for fd in (file, reader, writer, null):
        os.close(fd)


def test_a_memory_file_that_cannot_be_mapped_is_an_error_of_ours():
    """A write-only descriptor and a size beyond all memory do not leak an OSError."""
    sealed = seal_bytes("x", b"x")
    write_only = os.open(f"/proc/self/fd/{sealed.fd}", os.O_WRONLY)
    huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING)
    os.truncate(huge, 2**62)
    fcntl.fcntl(huge, fcntl.F_ADD_SEALS, memfd._ALL_SEALS)
    for fd in (write_only, huge):
        with pytest.raises(IsolationError, match="cannot be mapped"):
            map_sealed(fd)
    for fd in (sealed.fd, write_only, huge):
        os.close(fd)
