"""Sealed memory files: bytes that are hashed once and can't change afterwards, for anyone, the writer included.

Rules:

1. The source is read once. Each chunk is hashed in, and written to the memory file from, one private buffer, so the
   digest is that of the bytes in the memory file; nobody else can write it before it is sealed, because the descriptor
   has not left this process.
2. A sealed file carries all of ``F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE``; whoever receives one from
   another process checks that before it believes a digest (:func:`check_sealed`).
"""

import fcntl
import hashlib
import mmap
import os
from dataclasses import dataclass

from agent.errors import IsolationError, VerificationError

__all__ = ["CHUNK_BYTES", "SealedFile", "check_sealed", "map_sealed", "seal_bytes", "seal_file"]

CHUNK_BYTES = 1 << 18  # bytes; fits the cache of a core, so that hash and copy read memory once
_NAME_BYTES = 200  # the kernel takes 249; the name only shows in /proc
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class SealedFile:
    """A sealed memfd with what is known of it. The holder closes ``fd`` (:meth:`close`)."""

    name: str
    fd: int
    size: int
    sha256: str

    def close(self) -> None:
        """Close the descriptor; the memory lives on while another process holds one."""
        os.close(self.fd)


def _label(name: str) -> str:
    return name.encode("ascii", "replace").replace(b"\0", b"?")[:_NAME_BYTES].decode()


def seal_bytes(name: str, data: bytes) -> SealedFile:
    """Copy ``data`` into a new sealed memfd."""
    fd = os.memfd_create(_label(name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
    except OSError:
        os.close(fd)
        raise
    return SealedFile(name, fd, len(data), hashlib.sha256(data).hexdigest())


def seal_file(name: str, source_fd: int, max_bytes: int) -> SealedFile:
    """Read a file once, to its end, into a new sealed memfd, hashing the memory that was filled.

    Args:
        name: what the file is called in logs.
        source_fd: open for reading; read from offset 0.
        max_bytes: refuse anything larger.

    Raises:
        VerificationError: ``size``, when the file is larger than ``max_bytes`` or changes its size while it is read.
    """
    size = os.fstat(source_fd).st_size
    if size > max_bytes:
        raise VerificationError("size", f"{name} has {size} bytes, more than the limit of {max_bytes}")
    fd = os.memfd_create(_label(name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        digest = _copy(name, source_fd, fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _ALL_SEALS)
    except (OSError, VerificationError):
        os.close(fd)
        raise
    return SealedFile(name, fd, size, digest)


def _copy(name: str, source_fd: int, memory_fd: int, size: int) -> str:
    digest = hashlib.sha256()
    done = 0
    with memoryview(bytearray(CHUNK_BYTES)) as buffer:
        while count := os.preadv(source_fd, [buffer], done):
            done += count
            if done > size:
                raise VerificationError("size", f"{name} became longer while it was read")
            chunk = buffer[:count]
            digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(memory_fd, chunk) :]
    if done < size:
        raise VerificationError("size", f"{name} became shorter while it was read")
    return digest.hexdigest()


def check_sealed(fd: int) -> int:
    """Return the size of a memfd received from another process, once it is known that nobody can change it.

    Raises:
        IsolationError: when a seal is missing or it is no memfd.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise IsolationError(f"descriptor {fd} is not a memory file that can be sealed") from error
    if seals & _ALL_SEALS != _ALL_SEALS:
        raise IsolationError(f"descriptor {fd} is not completely sealed (seals {seals:#x})")
    return os.fstat(fd).st_size


def map_sealed(fd: int) -> mmap.mmap | bytes:
    """Map a sealed memfd for reading; an empty one gives ``b""``, which can't be mapped.

    Raises:
        IsolationError: it is not sealed, not open for reading, or larger than the address space that is left.
    """
    size = check_sealed(fd)
    try:
        return mmap.mmap(fd, size, prot=mmap.PROT_READ) if size else b""
    except (OSError, OverflowError) as error:
        raise IsolationError(f"descriptor {fd} with {size} bytes cannot be mapped: {error}") from error
