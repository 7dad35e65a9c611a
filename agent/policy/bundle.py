"""Policy bundles in OPA's format: read with limits, written reproducibly.

See https://www.openpolicyagent.org/docs/management-bundles#bundle-file-format. A bundle is read when all of this holds:

1. It is one gzip member of one tar archive, within :data:`MAX_BUNDLE_BYTES` and, unpacked,
   :data:`MAX_UNPACKED_BYTES`; nothing stands behind the archive's end.
2. Its members are regular files (folders are skipped) at unique, plain, relative paths: no links, devices, ``..``, sparse files.
3. Where the caller trusts keys, ``.signatures.json`` covers every file with one of them.
4. ``.manifest`` names no overlapping roots, no WebAssembly and only Rego v1; no file asks for what the engines lack
   (WebAssembly, plans, delta patches).
5. Data lies inside the roots, two files do not give the same value, and each folder's data is valid against the
   ``schema.json`` beside it. OPA ignores that file; here it decides.

Other files are kept out of the policy, as OPA does.
"""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import jsonschema
import msgspec
import referencing
import referencing.exceptions

from agent.errors import VerificationError
from agent.policy.documents import parse_json, parse_yaml
from agent.policy.signature import SIGNATURES_FILE, verify_files

__all__ = [
    "MANIFEST_FILE",
    "MAX_BUNDLE_BYTES",
    "MAX_FILES",
    "MAX_MODULE_BYTES",
    "MAX_PATH_BYTES",
    "MAX_PATH_DEPTH",
    "MAX_REVISION_CHARS",
    "MAX_UNPACKED_BYTES",
    "Bundle",
    "Manifest",
    "covers",
    "data_tree",
    "read_archive",
    "read_manifest",
]

MAX_BUNDLE_BYTES = 16 << 20
MAX_UNPACKED_BYTES = 64 << 20
MAX_FILES = 1024
MAX_PATH_BYTES = 255
MAX_PATH_DEPTH = 16
MAX_MODULE_BYTES = 1 << 20
MAX_REVISION_CHARS = 128
MANIFEST_FILE = ".manifest"
_DATA_JSON = "data.json"
_DATA_YAML = "data.yaml"
_SCHEMA = "schema.json"
_GZIP_WINDOW_BITS = 31  # zlib: 15 bits of window, +16 for a gzip header


class Manifest(msgspec.Struct, frozen=True):
    """What ``.manifest`` says; members that only other tools use are ignored."""

    revision: str = ""
    roots: tuple[str, ...] = ("",)
    rego_version: int = 1
    file_rego_versions: dict[str, int] = {}
    wasm: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that was read by the rules above. ``sha256`` is over the bytes as they came."""

    modules: Mapping[str, str]
    data: Mapping[str, Any]
    revision: str
    roots: tuple[str, ...]
    sha256: str

    @classmethod
    def from_bytes(cls, data: bytes, trusted_keys: Sequence[bytes] = ()) -> "Bundle":
        """Read a bundle.

        Args:
            data: the ``.tar.gz``.
            trusted_keys: EC P-256 public keys, PEM; with none given the signature is not looked at.

        Raises:
            VerificationError: with the first rule that does not hold.
            ConfigError: a trusted key cannot be read.
        """
        # 1. and 2. One archive of plain files.
        files = read_archive(data)
        # 3. Signed by whom the operator trusts.
        if trusted_keys:
            verify_files(files, trusted_keys)
        # 4. A manifest that both engines can honour.
        manifest = read_manifest(files.get(MANIFEST_FILE, b"{}"))
        _check_kinds(files)
        # 5. Data inside the roots, as its schemas say.
        tree = data_tree(files)
        _check_roots(tree, manifest.roots)
        _check_schemas(files, tree)
        return cls(_modules(files), tree, manifest.revision, manifest.roots, hashlib.sha256(data).hexdigest())


def read_archive(data: bytes) -> dict[str, bytes]:
    """Unpack a ``.tar.gz`` into path -> content (rules 1 and 2).

    Raises:
        VerificationError: ``bundle-archive``.
    """
    raw = _unpack(data)
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                path = _plain_path(member)
                if path in files:
                    raise VerificationError("bundle-archive", f"{path} stands twice")
                if len(files) == MAX_FILES:
                    raise VerificationError("bundle-archive", f"it holds over {MAX_FILES} files")
                source = archive.extractfile(member)
                files[path] = b"" if source is None else source.read()
            end = archive.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise VerificationError("bundle-archive", f"it is not a tar archive: {error}") from error
    if any(raw[end:]):  # tarfile stops in silence at a damaged header
        raise VerificationError("bundle-archive", "something stands behind its end")
    return files


def _unpack(data: bytes) -> bytes:
    if len(data) > MAX_BUNDLE_BYTES:
        raise VerificationError("bundle-archive", f"it has {len(data)} bytes, over {MAX_BUNDLE_BYTES}")
    inflate = zlib.decompressobj(_GZIP_WINDOW_BITS)
    try:
        raw = inflate.decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error as error:
        raise VerificationError("bundle-archive", f"it is not gzip: {error}") from error
    if inflate.unconsumed_tail:
        raise VerificationError("bundle-archive", f"unpacked it has over {MAX_UNPACKED_BYTES} bytes")
    if not inflate.eof or inflate.unused_data:
        raise VerificationError("bundle-archive", "it is not exactly one whole gzip member")
    return raw


def _plain_path(member: tarfile.TarInfo) -> str:
    path = member.name.removeprefix("./").removeprefix("/")
    parts = path.split("/")
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        raise VerificationError("bundle-archive", f"{path[:80]!r} is not a regular file")
    if len(path.encode(errors="surrogateescape")) > MAX_PATH_BYTES or len(parts) > MAX_PATH_DEPTH:
        raise VerificationError("bundle-archive", f"the path {path[:80]!r}... is too long or too deep")
    if not path.isprintable() or "\\" in path or any(part in {"", ".", ".."} for part in parts):
        raise VerificationError("bundle-archive", f"{path[:80]!r} is not a plain relative path")
    return path


def read_manifest(content: bytes) -> Manifest:
    """Decode a ``.manifest`` (rule 4).

    Raises:
        VerificationError: ``bundle-manifest``.
    """
    try:
        manifest = msgspec.convert(parse_json(MANIFEST_FILE, content), Manifest)
    except msgspec.ValidationError as error:
        raise VerificationError("bundle-manifest", str(error)) from error
    if len(manifest.revision) > MAX_REVISION_CHARS or not manifest.revision.isprintable() or " " in manifest.revision:
        raise VerificationError(
            "bundle-manifest", f"the revision is not printable text of at most {MAX_REVISION_CHARS} characters"
        )
    if manifest.wasm:
        raise VerificationError("bundle-manifest", "it asks for WebAssembly; only Rego is evaluated here")
    if manifest.rego_version != 1 or any(version != 1 for version in manifest.file_rego_versions.values()):
        raise VerificationError("bundle-manifest", "only Rego v1 is evaluated here")
    roots = [root.strip("/") for root in manifest.roots]
    for position, root in enumerate(roots):
        for other in roots[position + 1 :]:
            if covers(root, other) or covers(other, root):
                raise VerificationError("bundle-manifest", f"the roots {root!r} and {other!r} overlap")
    return msgspec.structs.replace(manifest, roots=tuple(roots))


def covers(root: str, path: str) -> bool:
    """Say whether a manifest root (``""`` is everything) covers a slash-separated path."""
    return root in {"", path} or path.startswith(root + "/")


def _check_kinds(files: Mapping[str, bytes]) -> None:
    for path in files:
        base = PurePosixPath(path).name
        if base in {MANIFEST_FILE, SIGNATURES_FILE} and path != base:
            raise VerificationError("bundle-content", f"{path}: only the top folder has one")
        if base in {"patch.json", "plan.json", "data.yml"} or base.endswith(".wasm"):
            raise VerificationError("bundle-content", f"{path}: this kind of file is not supported")


def _modules(files: Mapping[str, bytes]) -> dict[str, str]:
    modules = {}
    for path in sorted(files):
        if not path.endswith(".rego"):
            continue
        content = files[path]
        if len(content) > MAX_MODULE_BYTES:
            raise VerificationError("bundle-content", f"{path} has over {MAX_MODULE_BYTES} bytes")
        try:
            modules[path] = content.decode()
        except UnicodeDecodeError as error:
            raise VerificationError("bundle-content", f"{path} is not UTF-8") from error
    return modules


def data_tree(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Merge every ``data.json`` and ``data.yaml`` into one tree, each below the path of its folder.

    Raises:
        VerificationError: ``bundle-document`` or ``bundle-data``.
    """
    tree: dict[str, Any] = {}
    for path in sorted(files):
        folder, base = _split(path)
        if base not in {_DATA_JSON, _DATA_YAML}:
            continue
        value = (parse_json if base == _DATA_JSON else parse_yaml)(path, files[path])
        if not isinstance(value, dict):
            raise VerificationError("bundle-data", f"{path} does not hold an object")
        for key in reversed(folder):
            value = {key: value}
        _merge(tree, value, path)
    return tree


def _split(path: str) -> tuple[list[str], str]:
    *folder, base = path.split("/")
    return folder, base


def _merge(tree: dict[str, Any], addition: Mapping[str, Any], source: str) -> None:
    for key, value in addition.items():
        if key not in tree:
            tree[key] = value
        elif isinstance(tree[key], dict) and isinstance(value, dict):
            _merge(tree[key], value, source)
        else:
            raise VerificationError("bundle-data", f"{source}: another file also gives {key!r}")


def _check_roots(tree: Mapping[str, Any], roots: Sequence[str]) -> None:
    for path in _leaves(tree, ""):
        if not any(covers(root, path) for root in roots):
            raise VerificationError("bundle-data", f"data at {path!r} is outside the roots {list(roots)}")


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, path + "/")
        else:
            yield path


def _check_schemas(files: Mapping[str, bytes], tree: Mapping[str, Any]) -> None:
    for path in sorted(files):
        folder, base = _split(path)
        if base != _SCHEMA:
            continue
        schema = parse_json(path, files[path])
        if not isinstance(schema, dict):
            raise VerificationError("bundle-schema", f"{path} does not hold an object")
        value: Any = tree
        for key in folder:
            value = value.get(key, {}) if isinstance(value, dict) else {}
        try:
            kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            kind.check_schema(schema)
            # A registry of its own, so that a $ref never fetches anything.
            kind(schema, registry=referencing.Registry()).validate(value)
        except jsonschema.SchemaError as error:
            raise VerificationError("bundle-schema", f"{path} is not a JSON Schema: {error.message}") from error
        except jsonschema.ValidationError as error:
            raise VerificationError("bundle-schema", f"{path}: {error.json_path}: {error.message[:400]}") from error
        except (referencing.exceptions.Unresolvable, RecursionError) as error:
            raise VerificationError("bundle-schema", f"{path}: a reference cannot be resolved: {error}") from error
