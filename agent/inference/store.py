"""The node's store of model packages: ``<store>/<name>/<version>/``.

Rules:

1. A package is verified (signature, manifest) before it is visible, and what becomes visible is written from the sealed
   memory that was verified, never copied from the source a second time.
2. A version appears, changes or disappears by one rename, after its files are on the disk (fsync). A crash leaves the old
   state or the new one, and at most a directory whose name begins with a dot, which the next change removes.
3. One version has one content: another one needs ``replace``.
4. The store itself is trusted with nothing: a package is verified again when it is loaded.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agent.errors import ConfigError, HostError, VerificationError
from agent.inference.manifest import ModelManifest, version_key
from agent.inference.package import SIGNATURE_FILE, Package, PackageLimits, read_package
from agent.inference.signing import Signer, TrustStore, verify_package
from agent.isolation.memfd import SealedFile

__all__ = [
    "Installed",
    "StoredModel",
    "install",
    "is_package",
    "list_models",
    "model_directory",
    "package_directories",
    "remove",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,31}")
_INCOMING = ".incoming-"
_LOCK = ".lock"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A directory in the store; nothing is verified yet."""

    name: str
    version: str
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Installed:
    """What :func:`install` did.

    Attributes:
        manifest: of the package.
        sha256: digest of the package.
        signer: who signed it.
        path: where it is now.
        changed: False when the same content was there already.
    """

    manifest: ModelManifest
    sha256: str
    signer: Signer
    path: Path
    changed: bool


def model_directory(store: Path, name: str, version: str) -> Path:
    """Return where a version lies.

    Raises:
        ConfigError: name or version could not be those of a package.
    """
    if not (_NAME.fullmatch(name) and _VERSION.fullmatch(version)):
        raise ConfigError(f"model {name[:64]!r} version {version[:32]!r}: not a possible name and version")
    return store / name / version


def install(
    source: Path,
    store: Path,
    trust: TrustStore,
    *,
    replace: bool = False,
    allow_expired: bool = False,
    limits: PackageLimits | None = None,
) -> Installed:
    """Verify a package and put it into the store.

    Args:
        source: directory of the package.
        store: made when it is not there.
        trust: who may sign.
        replace: put it in the place of another content of the same version.
        allow_expired: accept a certificate chain that was in date once but is not now.
        limits: of the package.

    Raises:
        VerificationError: the package, its signature or manifest is refused, ``certificate-dates`` included.
        ConfigError: another content of that version is there and ``replace`` is not set.
        HostError: reading or writing fails.
    """
    package = read_package(source, limits)
    try:
        signer = verify_package(package, trust)
        if not (signer.in_date or allow_expired):
            raise VerificationError("certificate-dates", f"the certificate of {signer.subject} is not in date now")
        manifest = package.manifest()
        target = model_directory(store, manifest.name, manifest.version)
        with _changing(store):
            changed = _place(package, target, store, replace=replace)
    finally:
        package.close()
    return Installed(manifest, package.sha256, signer, target, changed)


def list_models(store: Path) -> list[StoredModel]:
    """List what is in the store, by name, then version.

    Raises:
        HostError: it can't be read.
    """
    found = []
    try:
        for name in store.iterdir():
            if not _NAME.fullmatch(name.name):
                continue
            for version in name.iterdir():
                if _VERSION.fullmatch(version.name):
                    size = sum(file.lstat().st_size for file in version.rglob("*") if file.is_file())
                    found.append(StoredModel(name.name, version.name, version, size))
    except OSError as error:
        raise HostError(f"model store {store}: {error.strerror}") from error
    return sorted(found, key=lambda model: (model.name, version_key(model.version), model.version))


def remove(store: Path, name: str, version: str) -> None:
    """Take a version out of the store.

    Raises:
        ConfigError: it is not there.
        HostError: the store can't be changed.
    """
    target = model_directory(store, name, version)
    if not target.is_dir():
        raise ConfigError(f"model {name} version {version} is not in {store}")
    with _changing(store):
        grave = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=store))
        target.rename(grave / "package")
        _sync(target.parent)
        shutil.rmtree(grave)
        with contextlib.suppress(OSError):  # other versions are there
            target.parent.rmdir()


@contextlib.contextmanager
def _changing(store: Path) -> Iterator[None]:
    """Hold the store's lock, clean up after a crash, and give operating system errors their name."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = os.open(store / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in store.glob(f"{_INCOMING}*"):
                shutil.rmtree(left)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise HostError(f"model store {store}: {error.strerror} ({error.filename})") from error


def _place(package: Package, target: Path, store: Path, *, replace: bool) -> bool:
    exists = target.exists()
    if exists and _same(package, target):
        return False
    if exists and not replace:
        raise ConfigError(f"{target} holds another content of this version; raise the version, or use --replace")
    fresh = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=store))
    try:
        _write(package, fresh)
        target.parent.mkdir(exist_ok=True)
        if exists:
            _exchange(fresh, target)
        else:
            fresh.rename(target)
        _sync(target.parent)
        _sync(store)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the old content
    return True


def _same(package: Package, target: Path) -> bool:
    try:
        present = read_package(target)
    except VerificationError:
        return False
    try:
        ours, theirs = package.signature, present.signature
        same_signature = ours is not None and theirs is not None and ours.sha256 == theirs.sha256
        return same_signature and present.sha256 == package.sha256
    finally:
        present.close()


def _write(package: Package, directory: Path) -> None:
    directories = {directory}
    files: dict[str, SealedFile] = dict(package.files)
    if package.signature is not None:
        files[SIGNATURE_FILE] = package.signature
    for path, sealed in files.items():
        target = directory / PurePosixPath(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        directories |= {directory / parent for parent in PurePosixPath(path).parents}
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            done = 0
            while done < sealed.size:
                done += os.sendfile(fd, sealed.fd, done, sealed.size - done)
            os.fsync(fd)
        finally:
            os.close(fd)
    for made in sorted(directories, reverse=True):
        made.chmod(0o755)
        _sync(made)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(first: Path, second: Path) -> None:
    """Exchange two directories in one step (renameat2, which Python does not offer)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number or errno.EIO, os.strerror(number), str(second))


def is_package(directory: Path) -> bool:
    """Whether a package can lie there; a link leads out of the store, to what its owner does not watch."""
    return not directory.is_symlink() and not directory.parent.is_symlink() and directory.is_dir()


def package_directories(store: Path) -> list[tuple[str, str]]:
    """List ``<name>/<version>`` directories; hidden ones are an installation on its way.

    Raises:
        HostError: the store can't be read.
    """
    try:
        names = [name for name in store.iterdir() if not name.name.startswith(".") and not name.is_symlink()]
    except OSError as error:
        raise HostError(f"models.store: {error.filename}: {error.strerror}") from error
    found: list[tuple[str, str]] = []
    for name in names:
        # What is closed to this process is no package of its; the watcher says so.
        with contextlib.suppress(PermissionError, NotADirectoryError, FileNotFoundError):
            versions = [version for version in name.iterdir() if not version.name.startswith(".")]
            found += [(name.name, version.name) for version in versions if is_package(version)]
    return found
