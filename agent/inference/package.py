"""Model packages: a directory, read once into sealed memory files.

Rules:

1. Each file is read exactly once, into a sealed memfd that is hashed on the way. The digest, the signature check, the
   measurement, the policy decision and the session all use those memfds; nobody opens the directory again.
2. The directory is walked by descriptor (``openat``), never by path. Symbolic links, devices, pipes and sockets are
   refused, so nothing outside the directory can be named by something inside.
3. File names are ASCII letters, digits and ``._+@=,~:%#-``: they become paths in the measurement log and in signatures.
4. The digest of a package is SHA-256 over the canonical JSON (RFC 8785) of ``{"files": {path: sha256}}`` with every
   file but the signature.
"""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from agent.errors import HostError, VerificationError
from agent.inference.manifest import MANIFEST_FILE, ModelManifest, parse_manifest
from agent.isolation.memfd import SealedFile, map_sealed, seal_file
from agent.records import canonical

__all__ = [
    "MANIFEST_FILE",
    "MODEL_FILE",
    "SIGNATURE_FILE",
    "ModelManifest",
    "Package",
    "PackageLimits",
    "package_digest",
    "read_package",
]

MODEL_FILE = "model.onnx"
SIGNATURE_FILE = "model.sig"

_NAME = re.compile(r"[A-Za-z0-9._+@=,~:%#-]{1,128}")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class PackageLimits:
    """What a package may cost before anyone has verified it."""

    max_files: int = 256
    max_file_bytes: int = 2 << 30
    max_total_bytes: int = 4 << 30
    max_depth: int = 8  # nested directories


@dataclass(frozen=True, slots=True)
class Package:
    """Files of a package in sealed memory.

    Attributes:
        files: path in the package to its sealed file; the signature is not among them.
        signature: ``model.sig``, when there is one.
        sha256: digest of the package (rule 4).
    """

    files: Mapping[str, SealedFile]
    signature: SealedFile | None
    sha256: str

    def digests(self) -> dict[str, str]:
        """Return each path's SHA-256 in hex."""
        return {path: sealed.sha256 for path, sealed in self.files.items()}

    def read(self, path: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            VerificationError: ``missing-file``.
        """
        return bytes(map_sealed(self.file(path).fd))

    def file(self, path: str) -> SealedFile:
        """Return one sealed file.

        Raises:
            VerificationError: ``missing-file``.
        """
        try:
            return self.files[path]
        except KeyError:
            raise VerificationError("missing-file", f"the package has no {path}") from None

    def manifest(self) -> ModelManifest:
        """Parse ``model.yaml`` out of the sealed bytes.

        Raises:
            VerificationError: ``missing-file``, ``size`` or ``manifest``.
        """
        self.file(MODEL_FILE)
        manifest = parse_manifest(self.read(MANIFEST_FILE))
        if manifest.labels is not None:
            self.file(manifest.labels)
        return manifest

    def close(self) -> None:
        """Close all descriptors; the memory lives on where another process holds them."""
        for sealed in (*self.files.values(), *([self.signature] if self.signature else [])):
            sealed.close()


def package_digest(digests: Mapping[str, str]) -> str:
    """Return the digest of a package (rule 4), given each file's SHA-256 in hex."""
    return hashlib.sha256(canonical({"files": dict(digests)})).hexdigest()


def read_package(directory: Path, limits: PackageLimits | None = None) -> Package:
    """Read a directory into sealed memory.

    Raises:
        VerificationError: ``symlink``, ``file-type``, ``file-name``, ``file-count``, ``depth`` or ``size``.
        HostError: the directory or a file can't be read.
    """
    reader = _Reader(limits or PackageLimits())
    try:
        root = os.open(directory, _OPEN | os.O_DIRECTORY)
        try:
            reader.walk(root, "", 1)
        finally:
            os.close(root)
    except OSError as error:
        reader.close()
        raise HostError(f"model package {directory}: {error.strerror} ({error.filename})") from error
    except VerificationError:
        reader.close()
        raise
    signature = reader.found.pop(SIGNATURE_FILE, None)
    files = dict(sorted(reader.found.items()))
    return Package(
        MappingProxyType(files), signature, package_digest({path: sealed.sha256 for path, sealed in files.items()})
    )


class _Reader:
    """Walks a directory and seals what it finds, within limits that count over the whole tree."""

    def __init__(self, limits: PackageLimits) -> None:
        self.found: dict[str, SealedFile] = {}
        self._limits = limits
        self._entries = 0
        self._room = limits.max_total_bytes

    def close(self) -> None:
        for sealed in self.found.values():
            sealed.close()

    def walk(self, directory_fd: int, prefix: str, depth: int) -> None:
        if depth > self._limits.max_depth:
            raise VerificationError("depth", f"{prefix}: directories nested deeper than {self._limits.max_depth}")
        with os.scandir(directory_fd) as entries:
            for entry in entries:
                path = prefix + entry.name
                # 1. No more files and directories than allowed.
                self._entries += 1
                if self._entries > self._limits.max_files:
                    raise VerificationError("file-count", f"more than {self._limits.max_files} files and directories")
                # 2. A name that the log, the signature and every tool read alike.
                if not _NAME.fullmatch(entry.name):
                    raise VerificationError("file-name", f"{path!r}: only letters, digits and ._+@=,~:%#-")
                # 3. A kind that is safe to open; again after opening, for it may have been swapped in between.
                _check_kind(path, entry.stat(follow_symlinks=False).st_mode)
                fd = _open_entry(path, entry.name, directory_fd)
                try:
                    self._take(path, fd, depth)
                finally:
                    os.close(fd)

    def _take(self, path: str, fd: int, depth: int) -> None:
        mode = os.fstat(fd).st_mode
        _check_kind(path, mode)
        if stat.S_ISDIR(mode):
            self.walk(fd, path + "/", depth + 1)
            return
        sealed = seal_file(path, fd, min(self._limits.max_file_bytes, self._room))
        self.found[path] = sealed
        self._room -= sealed.size


def _open_entry(path: str, name: str, directory_fd: int) -> int:
    try:
        return os.open(name, _OPEN, dir_fd=directory_fd)
    except OSError as error:
        # O_NOFOLLOW gives ELOOP for a link that took the entry's place since it was looked at.
        if stat.S_ISLNK(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
            raise VerificationError("symlink", f"{path} is a symbolic link") from error
        raise


def _check_kind(path: str, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise VerificationError("symlink", f"{path} is a symbolic link")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise VerificationError("file-type", f"{path} is neither a file nor a directory")
