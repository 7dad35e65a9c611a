"""What a stock Keylime reads and writes: pure functions of bytes.

Rules:

1. The formats are Keylime's own, API 2.5 of its registrar, verifier and tenant 7.14: a quote string, the PCR values beside it, the messages of a
   registration. Nothing here does I/O.
2. What a registrar sends is untrusted: a challenge that is not exactly ``magic | version | TPM2B_ID_OBJECT | TPM2B_ENCRYPTED_SECRET`` is
   a VerificationError of the check ``keylime-challenge``.
3. Keylime replays one list for PCR 10 from zero. The kernel's own list stands before the node's; it is followed only where it has its
   ``boot_aggregate`` and no more, because an entry that comes later would extend the PCR between ours.

Source: Keylime 7.14.3, ``keylime/tpm/tpm_util.py`` (quote, credential), ``registrar_agent.py`` (registration), ``ima/ast.py`` (list).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from agent.attest.measurement import BOOT_AGGREGATE, KERNEL_PCR, ZERO_PCR, parse_entries
from agent.attest.structures import ALG_SHA256
from agent.errors import HostError, VerificationError

__all__ = [
    "BINDING_PCR",
    "MAX_ANSWER_BYTES",
    "MAX_KERNEL_LIST_BYTES",
    "Challenge",
    "KernelList",
    "Registration",
    "Revocation",
    "activation",
    "measurement_list",
    "parse_challenge",
    "parse_kernel_list",
    "parse_revocation",
    "pcr_blob",
    "quote_string",
    "runtime_policy",
]

BINDING_PCR = 16
"""Holds the digest of the listener's public key; Keylime compares it in each quote."""

MAX_ANSWER_BYTES = 64 * 1024  # of a registrar
MAX_KERNEL_LIST_BYTES = 4096  # more than one boot_aggregate line, and that is all that is wanted
_SELECTIONS = 16  # of a TPML_PCR_SELECTION in memory
_DIGESTS_PER_LIST = 8  # of a TPML_DIGEST in memory
_DIGEST_BYTES = 64  # of a TPMU_HA in memory
_SELECT_BYTES = 3
_CHALLENGE = struct.Struct(">II")
_CHALLENGE_MAGIC = 0xBADCC0DE
_CHALLENGE_VERSION = 1
_CHECK = "keylime-challenge"
_KERNEL_LINE = re.compile(
    rf"{KERNEL_PCR} (?P<sha1>[0-9a-f]{{40}}) (?P<template>ima-ng|ima-sig) "
    rf"(?P<algorithm>[a-z0-9_-]{{1,16}}):(?P<digest>(?:[0-9a-f]{{2}}){{20,64}}) {BOOT_AGGREGATE} ?"
)
_LENGTH = struct.Struct("<I")


# --- quotes


def quote_string(attest: bytes, signature: bytes, pcrs: Mapping[int, bytes]) -> str:
    """Return a quote as Keylime reads it.

    Args:
        attest: TPMS_ATTEST.
        signature: TPMT_SIGNATURE.
        pcrs: the quoted PCRs of the SHA-256 bank.
    """
    return "r" + ":".join(base64.b64encode(part).decode() for part in (attest, signature, pcr_blob(pcrs)))


def pcr_blob(pcrs: Mapping[int, bytes]) -> bytes:
    """Return PCR values as ``tpm2_quote`` writes them: the TSS's structures as they lie in a little-endian memory, padded to their full size."""
    indices = sorted(pcrs)
    bitmap = sum(1 << index for index in indices)
    selections = [struct.pack("<HB3s2x", ALG_SHA256, _SELECT_BYTES, bitmap.to_bytes(_SELECT_BYTES, "little"))]
    selections += [bytes(8)] * (_SELECTIONS - 1)
    lists = [indices[at : at + _DIGESTS_PER_LIST] for at in range(0, len(indices), _DIGESTS_PER_LIST)]
    parts = [struct.pack("<I", 1), *selections, struct.pack("<I", len(lists))]
    for part in lists:
        digests = [struct.pack(f"<H{_DIGEST_BYTES}s", len(pcrs[index]), pcrs[index]) for index in part]
        digests += [bytes(2 + _DIGEST_BYTES)] * (_DIGESTS_PER_LIST - len(part))
        parts += [struct.pack("<I", len(part)), *digests]
    return b"".join(parts)


# --- registration


class Registration(msgspec.Struct, frozen=True):
    """Body of ``POST /v2.5/agents/{uuid}``.

    Attributes:
        ekcert: the endorsement certificate (DER, base64), where the TPM has one.
        ek_tpm: TPM2B_PUBLIC of the endorsement key.
        aik_tpm: TPM2B_PUBLIC of the attestation key.
        mtls_cert: the listener's own certificate (PEM).
        ip: where the verifier finds the listener.
        port: its port.
    """

    ekcert: bytes | None
    ek_tpm: bytes
    aik_tpm: bytes
    mtls_cert: str
    ip: str
    port: int

    @classmethod
    def of(
        cls,
        ek_certificate: bytes | None,
        ek_public: bytes,
        ak_public: bytes,
        certificate: bytes,
        contact: tuple[str, int],
    ) -> Registration:
        """Make one from TPMT_PUBLICs; ``certificate`` is PEM."""
        return cls(ek_certificate, _as_2b(ek_public), _as_2b(ak_public), certificate.decode("ascii"), *contact)

    def encode(self) -> bytes:
        """Return it as JSON."""
        return msgspec.json.encode(self)


def _as_2b(public: bytes) -> bytes:
    return struct.pack(">H", len(public)) + public


@dataclass(frozen=True, slots=True)
class Challenge:
    """What MakeCredential gave: ``credential_blob`` is a TPM2B_ID_OBJECT, ``encrypted_secret`` a TPM2B_ENCRYPTED_SECRET."""

    credential_blob: bytes
    encrypted_secret: bytes


class _Results(msgspec.Struct, frozen=True):
    blob: str


class _Answer(msgspec.Struct, frozen=True):
    results: _Results


def parse_challenge(body: bytes) -> Challenge:
    """Read a registrar's answer to a registration.

    Raises:
        VerificationError: ``keylime-challenge``.
    """
    # 1. size and JSON
    if len(body) > MAX_ANSWER_BYTES:
        raise VerificationError(_CHECK, f"{len(body)} bytes are over {MAX_ANSWER_BYTES}")
    try:
        text = msgspec.json.decode(body, type=_Answer).results.blob
        blob = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise VerificationError(_CHECK, f"not an answer with a blob: {error}") from error
    # 2. magic and version
    if len(blob) < _CHALLENGE.size or _CHALLENGE.unpack_from(blob) != (_CHALLENGE_MAGIC, _CHALLENGE_VERSION):
        raise VerificationError(_CHECK, "the blob does not begin as a credential does")
    # 3. two sized parts, and nothing after them
    credential, at = _sized(blob, _CHALLENGE.size)
    secret, at = _sized(blob, at)
    if at != len(blob):
        raise VerificationError(_CHECK, f"{len(blob) - at} bytes follow the blob's end")
    return Challenge(credential, secret)


def _sized(blob: bytes, at: int) -> tuple[bytes, int]:
    """Take a TPM2B with its length; returns it and where the next begins."""
    end = at + 2 + int.from_bytes(blob[at : at + 2])
    if at + 2 > len(blob) or end > len(blob):
        raise VerificationError(_CHECK, "the blob is cut short")
    return blob[at:end], end


def activation(secret: bytes, uuid: str) -> bytes:
    """Return the body of ``PUT /v2.5/agents/{uuid}/activate`` for a secret that the TPM decrypted."""
    # Keylime's key is the text that it encodes the secret as.
    tag = hmac.new(base64.b64encode(secret), uuid.encode("ascii"), "sha384").hexdigest()
    return msgspec.json.encode({"auth_tag": tag})


# --- notifications


class Revocation(msgspec.Struct, frozen=True):
    """What a verifier tells every node about one that failed: ``type``, whose ``agent_id``, and the ``event_id``."""

    type: str = ""
    agent_id: str = ""
    event_id: str = ""


class _Notification(msgspec.Struct, frozen=True):
    msg: str


def parse_revocation(body: bytes) -> Revocation:
    """Read the body of ``POST /v2.5/notifications/revocation``.

    Raises:
        VerificationError: ``keylime-notification``.
    """
    try:
        return msgspec.json.decode(msgspec.json.decode(body, type=_Notification).msg, type=Revocation)
    except ValueError as error:
        raise VerificationError("keylime-notification", f"not a revocation: {error}") from error


# --- the measurement list


@dataclass(frozen=True, slots=True)
class KernelList:
    """The kernel's own list as far as the node can follow it: ``lines`` of it, and the value of PCR 10 (SHA-256) after them."""

    lines: tuple[str, ...] = ()
    value: bytes = ZERO_PCR


def parse_kernel_list(text: bytes) -> KernelList:
    """Read ``ascii_runtime_measurements``.

    Raises:
        HostError: it holds more than ``boot_aggregate``, or something else.
    """
    lines = text.decode("ascii", "replace").splitlines()
    if not lines:
        return KernelList()
    if len(text) > MAX_KERNEL_LIST_BYTES or len(lines) > 1:
        raise HostError(
            "attest.keylime.enabled: the kernel's IMA measures files into PCR 10, and would go on to do so between the node's own entries: "
            "boot without an IMA policy (ima_policy=), or attest this node without Keylime"
        )
    found = _KERNEL_LINE.fullmatch(lines[0])
    if found is None or not _is_template(found):
        raise HostError(
            "attest.keylime.enabled: the kernel's IMA list begins with something else than a boot_aggregate of ima-ng or ima-sig"
        )
    return KernelList((lines[0],), _extended(ZERO_PCR, _template_data(found)))


def _template_data(line: re.Match[str]) -> bytes:
    digest = line["algorithm"].encode() + b":\0" + bytes.fromhex(line["digest"])
    fields = [digest, BOOT_AGGREGATE.encode() + b"\0", *([b""] if line["template"] == "ima-sig" else [])]
    return b"".join(_LENGTH.pack(len(field)) + field for field in fields)


def _is_template(line: re.Match[str]) -> bool:
    # IMA's format demands SHA-1; SHA-256 is what counts.
    return hashlib.sha1(_template_data(line), usedforsecurity=False).hexdigest() == line["sha1"]


def _extended(value: bytes, data: bytes) -> bytes:
    return hashlib.sha256(value + hashlib.sha256(data).digest()).digest()


def measurement_list(kernel: Iterable[str], entries: bytes) -> str:
    """Return a part of the list in its ASCII form, a line for each entry: the kernel's, then the node's own.

    Raises:
        VerificationError: ``log-replay``: the entries are not of the node's log.
    """
    own = (entry.ascii(KERNEL_PCR) for entry in parse_entries(entries, KERNEL_PCR))
    return "".join(f"{line}\n" for line in (*kernel, *own))


# --- what an operator approves


def runtime_policy(approved: Mapping[str, frozenset[str]], excludes: tuple[str, ...]) -> dict[str, object]:
    """Return a Keylime runtime policy.

    Args:
        approved: SHA-256 digests by the path in the list.
        excludes: regular expressions of paths that are not checked.
    """
    return {
        # A generator below 2 stands for an empty list, and Keylime then checks nothing.
        "meta": {"version": 1, "generator": 2},
        "release": 0,
        "digests": {path: sorted(digests) for path, digests in sorted(approved.items())},
        "excludes": list(excludes),
        "keyrings": {},
        "ima": {"ignored_keyrings": [], "log_hash_alg": "sha1", "dm_policy": None},
        "ima-buf": {},
        "verification-keys": "",
    }
