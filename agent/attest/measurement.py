"""The measurement log's format: pure functions of bytes, used by the node and by its appraiser.

What a log means is in :mod:`agent.attest.log_state`.

Rules:

1. An entry is IMA's template ``ima-ng`` byte for byte as Linux writes it to ``binary_runtime_measurements`` on a
   little-endian machine: ``pcr | SHA-1 template digest | name | data``. So ``evmctl`` and Keylime replay the log.
   Source: Linux ``security/integrity/ima/ima_template.c``, ``ima_template_lib.c`` and ``ima_fs.c``.
2. A bank is extended with that bank's own hash of the template data (Linux since 5.8).
3. A reader accepts only what the writer below can write: SHA-256 file digests, printable paths without spaces, one
   PCR, a right template digest. Anything else is a VerificationError of the check ``log-replay``.
4. A reader may know entries beforehand (:func:`known_models`): the same bytes mean the same, and need not be read again.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from agent.errors import VerificationError

__all__ = [
    "ALLOWED_PCRS",
    "BOOT_AGGREGATE",
    "CONFIG_PATH",
    "KERNEL_PCR",
    "KEY_SLASHES",
    "MAX_ENTRY_BYTES",
    "MAX_LOG_BYTES",
    "MAX_LOG_ENTRIES",
    "MAX_PATH_BYTES",
    "PCR_BYTES",
    "ZERO_PCR",
    "Entry",
    "KnownEntry",
    "boot_aggregate",
    "config_entry",
    "known_models",
    "model_entry",
    "model_path",
    "parse_entries",
    "policy_entry",
    "policy_path",
    "read_entry",
    "refused_entry",
    "refused_path",
    "replay",
    "replay_log",
    "unload_entry",
]

MAX_LOG_ENTRIES = 100_000  # in one boot
MAX_LOG_BYTES = 32 * 1024 * 1024  # in one boot
MAX_PATH_BYTES = 512
PCR_BYTES = 32  # SHA-256 bank
ZERO_PCR = bytes(PCR_BYTES)
ALLOWED_PCRS = frozenset({8, 9, 11, 12, 13, 14, 15})
"""PCRs that can hold the log: 0-7 are the firmware's, 10 is the kernel's, 16 and 23 are resettable at locality 0."""
KERNEL_PCR = 10
"""Where Linux keeps its own IMA list; Keylime takes a list from nowhere else."""

BOOT_AGGREGATE = "boot_aggregate"
CONFIG_PATH = "edgewarden/config"
_TEMPLATE = b"ima-ng"
_DIGEST_PREFIX = b"sha256:\0"
_HEADER = struct.Struct("<I20sI6sI")  # pcr, SHA-1 template digest, name's length, name, length of the data
_DATA_HEAD = struct.Struct("<I8s32sI")  # length of the digest field, algorithm, digest, length of the path field
_LENGTH = struct.Struct("<I")
_LENGTH_AT = _HEADER.size - _LENGTH.size
_DIGEST_FIELD_BYTES = len(_DIGEST_PREFIX) + PCR_BYTES
_MAX_DATA_BYTES = 2 * _LENGTH.size + _DIGEST_FIELD_BYTES + MAX_PATH_BYTES + 1
MAX_ENTRY_BYTES = _HEADER.size + _MAX_DATA_BYTES

_PATH = re.compile(r"[!-~]+")
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_FILE = re.compile(r"[!-.0-~]+(?:/[!-.0-~]+)*")  # printable ASCII without spaces, no empty part
KEY_SLASHES = 2  # at least, in ``name/version/file``
_NOTHING = hashlib.sha256(b"").digest()


def _refuse(message: str) -> VerificationError:
    return VerificationError("log-replay", message)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One measurement: the SHA-256 digest of what stands behind a path."""

    path: str
    digest: bytes

    def template_data(self) -> bytes:
        """Return the bytes whose hash extends a PCR: ``d-ng`` and ``n-ng``, each after its u32 length."""
        path = self.path.encode("ascii") + b"\0"
        digest = _DIGEST_PREFIX + self.digest
        return _LENGTH.pack(len(digest)) + digest + _LENGTH.pack(len(path)) + path

    def encode(self, pcr: int) -> bytes:
        """Return the entry as it stands in the binary log."""
        data = self.template_data()
        return _HEADER.pack(pcr, _sha1(data), len(_TEMPLATE), _TEMPLATE, len(data)) + data

    def ascii(self, pcr: int) -> str:
        """Return the entry as it stands in ``ascii_runtime_measurements``."""
        return f"{pcr:2d} {_sha1(self.template_data()).hex()} ima-ng sha256:{self.digest.hex()} {self.path}"


class KnownEntry(Entry, frozen=True, gc=False):
    """A model file's entry with what follows from it.

    Attributes:
        file: ``name/version/file`` and the digest in hex.
        extends: what the SHA-256 bank is extended with.
    """

    file: tuple[str, str]
    extends: bytes


def known_models(models: Mapping[str, Iterable[str]], pcr: int) -> dict[bytes, KnownEntry]:
    """Return what the log's bytes are for approved model files, so that a reader of many logs needs no more than look each entry up.

    Args:
        models: digests in hex by ``name/version/file``. A key that no log entry can hold is left out: no log has it.
        pcr: of the log.
    """
    known: dict[bytes, KnownEntry] = {}
    for key, digests in models.items():
        path = model_path(key)
        if key.count("/") < KEY_SLASHES or len(path) > MAX_PATH_BYTES or not _PATH.fullmatch(path):
            continue
        for digest in digests:
            entry = Entry(path, bytes.fromhex(digest))
            extends = hashlib.sha256(entry.template_data()).digest()
            known[entry.encode(pcr)] = KnownEntry(path, entry.digest, (key, digest), extends)
    return known


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()  # IMA's format demands it; SHA-256 is what counts


def _entry(path: str, digest: bytes) -> Entry:
    if len(path) > MAX_PATH_BYTES:
        raise VerificationError("measurement-path", f"{path[:80]!r}… is over {MAX_PATH_BYTES} bytes")
    if len(digest) != PCR_BYTES:
        raise VerificationError("measurement-path", f"the digest of {path!r} is not a SHA-256 digest")
    return Entry(path, digest)


def _segment(word: str) -> str:
    if not _SEGMENT.fullmatch(word):
        raise VerificationError("measurement-path", f"{word!r} is not a name that a log entry can hold")
    return word


def _model_key(name: str, version: str, file: str) -> str:
    if not _FILE.fullmatch(file) or not {".", ".."}.isdisjoint(file.split("/")):
        raise VerificationError("measurement-path", f"{file!r} is not a file name that a log entry can hold")
    return f"{_segment(name)}/{_segment(version)}/{file}"


def model_path(key: str) -> str:
    """Return the log's path of a file handed over, from its ``name/version/file``."""
    return f"edgewarden/models/{key}"


def refused_path(key: str) -> str:
    """Return the log's path of a file refused, from its ``name/version/file``."""
    return f"edgewarden/refused/{key}"


def policy_path(revision: str) -> str:
    """Return the log's path of a policy bundle."""
    return f"edgewarden/policy/{revision}"


def boot_aggregate(pcrs: Iterable[bytes]) -> Entry:
    """Return the first entry of a log: SHA-256 over PCR 0-9 of the SHA-256 bank, in that order."""
    return Entry(BOOT_AGGREGATE, hashlib.sha256(b"".join(pcrs)).digest())


def config_entry(digest: bytes) -> Entry:
    """Measure the security-relevant settings (SHA-256 of their JCS)."""
    return _entry(CONFIG_PATH, digest)


def policy_entry(revision: str, digest: bytes) -> Entry:
    """Measure a policy bundle's bytes before it takes effect."""
    return _entry(policy_path(_segment(revision)), digest)


def model_entry(name: str, version: str, file: str, digest: bytes) -> Entry:
    """Measure a model file before it is handed over.

    Raises:
        VerificationError: ``measurement-path`` when the names cannot stand in a log entry; so for all below.
    """
    return _entry(model_path(_model_key(name, version, file)), digest)


def refused_entry(name: str, version: str, file: str, digest: bytes) -> Entry:
    """Note a model file whose digest is wrong, so that it was not loaded."""
    return _entry(refused_path(_model_key(name, version, file)), digest)


def unload_entry(name: str, version: str) -> Entry:
    """Note that a model's version is out of force; the digest is that of no bytes."""
    return _entry(f"edgewarden/unload/{_segment(name)}/{_segment(version)}", _NOTHING)


def read_entry(data: bytes, at: int, pcr: int) -> tuple[Entry, int] | None:
    """Read the entry at an offset; None when the bytes end before it does.

    Returns:
        The entry and the offset of the next one.

    Raises:
        VerificationError: ``log-replay``: the bytes are not an entry that this module writes for that PCR.
    """
    found = _read(data, at, pcr)
    return None if found is None else (found[0], found[2])


def _read(data: bytes, at: int, pcr: int) -> tuple[Entry, bytes, int] | None:
    """Return the entry, its template data and the offset of the next one."""
    data_at = at + _HEADER.size
    if len(data) < data_at:
        return None
    entry_pcr, sha1, name_length, name, length = _HEADER.unpack_from(data, at)
    if entry_pcr != pcr:
        raise _refuse(f"an entry is for PCR {entry_pcr}, not {pcr}")
    if name_length != len(_TEMPLATE) or name != _TEMPLATE:
        raise _refuse("an entry's template is not ima-ng")
    if length > _MAX_DATA_BYTES:
        raise _refuse(f"an entry's data of {length} bytes is over {_MAX_DATA_BYTES}")
    end = data_at + length
    if len(data) < end:
        return None
    template_data = data[data_at:end]
    entry = _read_template(template_data)
    if _sha1(template_data) != sha1:
        raise _refuse(f"the template digest of {entry.path!r} is wrong")
    return entry, template_data, end


def _read_template(data: bytes) -> Entry:
    path_at = _DATA_HEAD.size
    if len(data) > path_at:
        digest_length, algorithm, digest, path_length = _DATA_HEAD.unpack_from(data)
        lengths = (digest_length, path_length) == (_DIGEST_FIELD_BYTES, len(data) - path_at)
        if lengths and algorithm == _DIGEST_PREFIX and data[-1] == 0:
            path = data[path_at:-1].decode("latin-1")  # what is not ASCII does not match
            if _PATH.fullmatch(path):
                return Entry(path, digest)
    raise _refuse("an entry's data is not a SHA-256 digest and a printable path")


def parse_entries(data: bytes, pcr: int) -> Iterator[Entry]:
    """Yield the entries of a binary log.

    Raises:
        VerificationError: ``log-replay``: malformed, cut short, or over a limit.
    """
    return iter(replay_log(data, pcr)[0])


def replay_log(
    data: bytes, pcr: int, start: bytes = ZERO_PCR, known: Mapping[bytes, KnownEntry] | None = None
) -> tuple[list[Entry], bytes]:
    """Return the entries of a binary log and the SHA-256 PCR after extending it by them: both in one pass.

    Args:
        data: the log.
        pcr: that its entries must be for.
        start: what the PCR held before.
        known: entries by their bytes, for the same PCR.

    Raises:
        VerificationError: ``log-replay``: malformed, cut short, or over a limit.
    """
    if len(data) > MAX_LOG_BYTES:
        raise _refuse(f"{len(data)} bytes of entries are over {MAX_LOG_BYTES}")
    entries: list[Entry] = []
    value, at, size, sha256, length_at = start, 0, len(data), hashlib.sha256, _LENGTH.unpack_from
    find = (known or {}).get
    while at < size:
        # The bytes up to where this entry says that it ends: either known, or looked at with care.
        end = at + _HEADER.size + length_at(data, at + _LENGTH_AT)[0] if at + _HEADER.size <= size else size
        same = find(data[at:end])
        entry, extends, at = _read_whole(data, at, pcr) if same is None else (same, same.extends, end)
        if len(entries) == MAX_LOG_ENTRIES:
            raise _refuse(f"the log has more than {MAX_LOG_ENTRIES} entries")
        entries.append(entry)
        value = sha256(value + extends).digest()
    return entries, value


def _read_whole(data: bytes, at: int, pcr: int) -> tuple[Entry, bytes, int]:
    found = _read(data, at, pcr)
    if found is None:
        raise _refuse("the last entry is cut short")
    entry, template_data, end = found
    return entry, hashlib.sha256(template_data).digest(), end


def replay(entries: Iterable[Entry], start: bytes = ZERO_PCR) -> bytes:
    """Return the SHA-256 PCR after extending it by the entries, in their order."""
    value = start
    for entry in entries:
        value = hashlib.sha256(value + hashlib.sha256(entry.template_data()).digest()).digest()
    return value
