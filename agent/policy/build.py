"""Building and signing bundles: the same sources give the same bytes.

Rules:

1. Modules stand in the bundle at their path below ``rego/``; tests (``*_test.rego``) stay out of it.
2. All data becomes one ``data.json`` with sorted keys, so that no engine has YAML to interpret; each ``schema.json``
   stays where it was, so that the node checks the data again.
3. Each source folder has a ``.manifest`` with its own roots, which must be disjoint; the bundle's has them all.
4. Nothing that changes between two builds is written: no times, owners, or order of a directory.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from agent.errors import ConfigError, VerificationError
from agent.policy.bundle import MANIFEST_FILE, MAX_UNPACKED_BYTES, Bundle, data_tree, read_archive, read_manifest
from agent.policy.signature import SIGNATURES_FILE, sign_files

__all__ = ["archive", "build", "sign"]

_DATA_FILES = {"data.json", "data.yaml"}


def build(rego_dir: Path, policies_dir: Path, revision: str) -> bytes:
    """Make one bundle of both folders.

    Args:
        rego_dir: modules, and a ``.manifest``.
        policies_dir: ``<area>/data.yaml`` with ``<area>/schema.json``, and a ``.manifest``.
        revision: what the bundle is called; at most ``MAX_REVISION_CHARS`` printable characters, no space.

    Returns:
        The bundle's bytes; they pass :meth:`agent.policy.bundle.Bundle.from_bytes`.

    Raises:
        ConfigError: a folder cannot be read.
        VerificationError: what stands there makes no valid bundle.
    """
    code = _read_folder(rego_dir)
    data = _read_folder(policies_dir)
    files: dict[str, bytes] = {}
    for path, content in code.items():
        if path.endswith(".rego") and not path.endswith("_test.rego"):
            files[f"rego/{path}"] = content
    for source in (code, data):
        files |= {path: content for path, content in source.items() if path.rsplit("/", 1)[-1] == "schema.json"}
    if misplaced := [path for path in code if path.rsplit("/", 1)[-1] in _DATA_FILES]:
        raise VerificationError("bundle-data", f"{misplaced[0]}: data stands in the policies folder, not beside code")
    tree = data_tree(data)
    files["data.json"] = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    roots = [root for source in (code, data) for root in read_manifest(source.get(MANIFEST_FILE, b"{}")).roots]
    manifest = {"revision": revision, "roots": sorted(roots), "rego_version": 1}
    files[MANIFEST_FILE] = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    bundle = archive(files)
    Bundle.from_bytes(bundle)
    return bundle


def sign(bundle: bytes, private_key_pem: bytes, key_id: str = "") -> bytes:
    """Return the bundle with OPA's ``.signatures.json`` in it; an older signature is replaced.

    Raises:
        VerificationError: the bundle cannot be read.
        ConfigError: the key is not an EC P-256 private key.
    """
    files = read_archive(bundle)
    Bundle.from_bytes(bundle)
    files[SIGNATURES_FILE] = sign_files(files, private_key_pem, key_id)
    return archive(files)


def _read_folder(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    size = 0
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise VerificationError("bundle-content", f"{name} is a symbolic link")
        if not path.is_file() or (path.name.startswith(".") and name != MANIFEST_FILE):
            continue
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        size += len(files[name])
        if size > MAX_UNPACKED_BYTES:
            raise VerificationError("bundle-content", f"{folder} holds over {MAX_UNPACKED_BYTES} bytes")
    return files


def archive(files: Mapping[str, bytes]) -> bytes:
    """Pack files into a ``.tar.gz``, the same bytes each time (rule 4)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(files):
            member = tarfile.TarInfo(path)
            member.size = len(files[path])
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(files[path]))
    return gzip.compress(raw.getvalue(), mtime=0)
