"""Packages: one reading, into memory that nobody can change."""

import hashlib
import json
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import HostError, VerificationError
from agent.inference.package import PackageLimits, package_digest, read_package
from agent.inference.signing import TrustStore, verify_package
from tests.support.models import new_key, sign_directory, write_tiny

KEY = new_key()
TRUST = TrustStore((KEY.public_key(),))


@pytest.fixture
def directory(tmp_path):
    return sign_directory(write_tiny(tmp_path / "tiny" / "1", external=True), KEY)


def _open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def _refusal(directory, limits=None):
    before = _open_descriptors()
    with pytest.raises(VerificationError) as caught:
        read_package(directory, limits)
    assert _open_descriptors() == before, "a refused package leaves descriptors open"
    return caught.value.check


def test_digest_is_over_every_file_but_the_signature(directory):
    """The package's digest can be computed with standard tools alone."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "model.sig"]
    digests = {path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    document = json.dumps({"files": digests}, sort_keys=True, separators=(",", ":"))
    package = read_package(directory)
    assert package.sha256 == hashlib.sha256(document.encode()).hexdigest() == package_digest(digests)
    assert package.digests() == digests
    assert set(digests) == {"model.onnx", "model.yaml", "weights/data.bin"}
    package.close()


def test_what_was_read_stays_what_it_was(directory):
    """After reading, changes on the disk reach neither the digest nor the bytes."""
    package = read_package(directory)
    before = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(b"evil")
    assert package.read("model.onnx") == before
    verify_package(package, TRUST)
    package.close()


def test_sealed_files_cannot_be_written(directory):
    """Not even the process that made them can change the bytes that were hashed."""
    package = read_package(directory)
    with pytest.raises(PermissionError):
        os.write(package.file("model.onnx").fd, b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(package.file("model.onnx").fd, 0)
    package.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_anywhere_is_refused(tmp_path_factory, data):
    """One byte changed in any file of the package, and the signature does not hold (or the change is outside of it)."""
    directory = sign_directory(write_tiny(tmp_path_factory.mktemp("flip") / "1", external=True), KEY)
    path = directory / data.draw(st.sampled_from(["model.onnx", "model.yaml", "weights/data.bin"]))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    package = read_package(directory)
    with pytest.raises(VerificationError) as caught:
        verify_package(package, TRUST)
    package.close()
    assert caught.value.check == "file-digest"


def test_swapped_external_data_is_refused(directory):
    """The weights of another training under the same graph are not what was signed."""
    (directory / "weights" / "data.bin").write_bytes(b"\0" * (directory / "weights" / "data.bin").stat().st_size)
    with pytest.raises(VerificationError, match="file-digest"):
        verify_package(read_package(directory), TRUST)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden", "weights/more.bin", ".git", "weights/model.sig"])
def test_an_unlisted_file_is_refused(directory, name):
    """Any file that the signature does not list, a second model.sig below included."""
    (directory / name).write_bytes(b"x")
    with pytest.raises(VerificationError, match="unlisted-file"):
        verify_package(read_package(directory), TRUST)


def test_a_missing_file_is_refused(directory):
    """A file that was signed and is gone."""
    (directory / "weights" / "data.bin").unlink()
    with pytest.raises(VerificationError, match="missing-file"):
        verify_package(read_package(directory), TRUST)


def test_a_package_without_signature_is_refused(directory):
    """No model.sig, no model."""
    (directory / "model.sig").unlink()
    with pytest.raises(VerificationError, match="missing-signature"):
        verify_package(read_package(directory), TRUST)


def test_an_oversized_signature_is_refused(directory):
    """The bundle's size is looked at before it is mapped."""
    (directory / "model.sig").write_bytes(b" " * (1 << 20) + b" ")
    with pytest.raises(VerificationError, match="bundle-size"):
        verify_package(read_package(directory), TRUST)


@pytest.mark.parametrize("target", ["/etc/hostname", "model.onnx", "../elsewhere", "weights"])
def test_symbolic_links_are_refused(directory, target):
    """A link is refused wherever it points, to the inside too."""
    (directory / "link").symlink_to(target)
    assert _refusal(directory) == "symlink"


def test_a_linked_directory_is_refused(directory):
    """A directory that is a link could lead anywhere."""
    (directory / "weights").rename(directory.parent / "elsewhere")
    (directory / "weights").symlink_to("../elsewhere")
    assert _refusal(directory) == "symlink"


def test_a_package_that_is_a_link_itself_is_refused(directory, tmp_path):
    """The last step of the path is not followed."""
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(HostError):
        read_package(tmp_path / "link")


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_special_files_are_refused_without_waiting(directory, kind):
    """A pipe that nobody writes to does not hold the reader up."""
    path = directory / "special"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    assert _refusal(directory) == "file-type"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_device_nodes_are_refused(directory):
    """A device is never opened: opening one can have effects."""
    os.mknod(directory / "zero", 0o20666, os.makedev(1, 5))
    assert _refusal(directory) == "file-type"


@pytest.mark.parametrize("name", ["a b", "a\\b", "ü", "a\nb", "*", "a\x7f", 'a"b', "x" * 129])
def test_awkward_names_are_refused(directory, name):
    """Names that log, signature and tools could read differently."""
    (directory / name).write_bytes(b"")
    assert _refusal(directory) == "file-name"


def test_limits_hold(directory):
    """Files, bytes of one, bytes of all, depth: each has its limit."""
    assert _refusal(directory, PackageLimits(max_files=4)) == "file-count"
    assert _refusal(directory, PackageLimits(max_file_bytes=100)) == "size"
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    assert _refusal(directory, PackageLimits(max_total_bytes=total - 1)) == "size"
    assert _refusal(directory, PackageLimits(max_depth=1)) == "depth"
    read_package(directory, PackageLimits(max_files=5, max_total_bytes=total)).close()


def test_a_directory_that_is_not_there_is_the_hosts_error(tmp_path):
    """Absence is not a verification failure; it still is a named error."""
    with pytest.raises(HostError):
        read_package(tmp_path / "nothing")


def test_swapping_a_file_for_a_link_while_reading_never_leaks_the_target(tmp_path):
    """A racing writer gets a refusal or the true file, never what its link points to."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    directory = write_tiny(tmp_path / "1")
    victim = directory / "victim"
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            (directory.parent / "new").write_bytes(b"true")
            (directory.parent / "new").replace(victim)
            (directory.parent / "new").symlink_to(secret)
            (directory.parent / "new").replace(victim)

    victim.write_bytes(b"true")
    racer = threading.Thread(target=swap)
    racer.start()
    seen: set[str | bytes] = set()
    try:
        for _ in range(300):
            try:
                package = read_package(directory)
            except VerificationError as error:
                seen.add(error.check)
            except HostError:
                seen.add("host")
            else:
                seen.add(package.read("victim"))
                package.close()
    finally:
        stop.set()
        racer.join()
    assert b"secret" not in seen
    assert seen <= {b"true", b"", "symlink", "size", "host"}


def test_label_file_must_be_in_the_package(tmp_path):
    """A manifest that names a label file outside of the package is refused."""
    package = read_package(write_tiny(tmp_path / "1", labels="../labels.txt"))
    with pytest.raises(VerificationError, match="missing-file"):
        package.manifest()
