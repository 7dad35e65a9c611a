"""The only door to the TPM (``tpm2_pytss``).

Rules:

1. An attestation key is a primary key of the endorsement hierarchy from a fixed template: the same TPM makes the same
   key again, so nothing is stored. A TPM that makes another key than the enrolled one was cleared.
2. An extend goes to every allocated bank, each with its own hash of the same data.
3. The door blocks; :mod:`agent.attest.tpm_thread` keeps it off the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_HC,
    TPM2B_DATA,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMT_HA,
    TPMT_PUBLIC,
    TPMU_HA,
    TSS2_Exception,
)
from tpm2_pytss.utils import NVReadEK, create_ek_template

from agent.attest.structures import AK_TEMPLATE, ClockInfo, parse_ak_public
from agent.errors import TpmError

__all__ = ["Endorsement", "Tpm", "TpmClearedError"]

MAX_TRANSIENT_HANDLES = 64
MAX_BANKS = 16
PCRS_PER_READ = 8  # TPM2_PCR_Read answers with at most 8 digests

_TSS_LAYER_MASK = 0x00FF0000  # zero when the TPM itself answered
_BANK_HASHES = {
    0x0004: "sha1",
    0x000B: "sha256",
    0x000C: "sha384",
    0x000D: "sha512",
    0x0012: "sm3",
    0x0027: "sha3_256",
    0x0028: "sha3_384",
    0x0029: "sha3_512",
}
_EK_TYPES = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-RSA2048", "EK-HIGH-ECC256", "EK-HIGH-ECC384")
_T = TypeVar("_T")


class TpmClearedError(TpmError):
    """The TPM was cleared or exchanged since this node was enrolled: enrol it again."""


@dataclass(frozen=True, slots=True)
class Endorsement:
    """An endorsement key: its TCG profile's name, its certificate (DER) and its public area (TPMT_PUBLIC)."""

    profile: str
    certificate: bytes
    public: bytes


def _ours(error: TSS2_Exception, doing: str) -> TpmError:
    return TpmError(f"TPM: {doing}: {error} (rc {error.rc:#x})")


class Tpm:
    """One connection to a TPM with its attestation key loaded. Blocking; use it from one thread.

    Args:
        tcti: TCTI string, for example ``device:/dev/tpmrm0`` or ``swtpm:host=127.0.0.1,port=2321``.
        enrolled_ak: TPMT_PUBLIC that this node was enrolled with, if it was.

    Attributes:
        ak_public: TPMT_PUBLIC of the attestation key.

    Raises:
        TpmError: no TPM answers there, or it has no SHA-256 bank or an unknown one.
        TpmClearedError: its attestation key is not ``enrolled_ak``.
    """

    def __init__(self, tcti: str, enrolled_ak: bytes | None = None) -> None:
        try:
            self._esys = ESAPI(tcti)
        except RuntimeError as error:  # TSS2_Exception is one, and the loader raises others
            raise TpmError(
                f"TPM: no connection over {tcti!r}: {error}; see 'edgewarden doctor' and tpm.tcti"
            ) from error
        self._broken = False
        try:
            self._flush_stale()
            self._banks = self._allocated_banks()
            self._ak = ESYS_TR.NONE
            self._ak, self.ak_public = self._create_ak()
            if enrolled_ak is not None and enrolled_ak != self.ak_public:
                raise TpmClearedError("TPM: it makes another attestation key than the enrolled one: enrol again")
        except BaseException:
            self._esys.close()
            raise

    @property
    def banks(self) -> tuple[str, ...]:
        """Allocated PCR banks by name of their hash."""
        return tuple(_BANK_HASHES[bank] for bank in self._banks)

    @property
    def broken(self) -> bool:
        """Whether the connection, not the TPM's answer, failed: a new connection is needed."""
        return self._broken

    def _run(self, doing: str, command: Callable[..., _T], *args: object) -> _T:
        try:
            return command(*args)
        except TSS2_Exception as error:
            self._broken = self._broken or bool(error.rc & _TSS_LAYER_MASK)
            raise _ours(error, doing) from error

    def _flush_stale(self) -> None:
        """Flush what a killed agent left. Behind a resource manager there is nothing; without one, nobody else shares."""

        def flush() -> None:
            _, found = self._esys.get_capability(TPM2_CAP.HANDLES, TPM2_HC.TRANSIENT_FIRST, MAX_TRANSIENT_HANDLES)
            for handle in found.data.handles:
                self._esys.flush_context(self._esys.tr_from_tpmpublic(handle))

        self._run("flush stale contexts", flush)

    def _allocated_banks(self) -> tuple[int, ...]:
        _, found = self._run("read the PCR banks", self._esys.get_capability, TPM2_CAP.PCRS, 0, MAX_BANKS)
        selections = found.data.assignedPCR
        banks = tuple(int(bank.hash) for bank in selections if any(bytes(bank.pcrSelect)[: bank.sizeofSelect]))
        unknown = [hex(bank) for bank in banks if _BANK_HASHES.get(bank) not in hashlib.algorithms_available]
        if unknown or TPM2_ALG.SHA256 not in banks:
            raise TpmError(f"TPM: needs a SHA-256 bank and can't extend {unknown}: allocate other PCR banks")
        return banks

    def _create_ak(self) -> tuple[Any, bytes]:
        template, _ = TPMT_PUBLIC.unmarshal(AK_TEMPLATE + bytes(4))  # an empty point
        handle, public, *_ = self._run(
            "create the attestation key",
            self._esys.create_primary,
            TPM2B_SENSITIVE_CREATE(),
            TPM2B_PUBLIC(publicArea=template),
            ESYS_TR.ENDORSEMENT,
        )
        return handle, parse_ak_public(public.publicArea.marshal()).marshaled

    def clock(self) -> ClockInfo:
        """Read clock, resetCount and restartCount; not signed."""
        info = self._run("read the clock", self._esys.read_clock).clockInfo
        return ClockInfo(int(info.clock), int(info.resetCount), int(info.restartCount), bool(info.safe))

    def read_pcrs(self, indices: Iterable[int]) -> dict[int, bytes]:
        """Read PCRs of the SHA-256 bank, in ascending order."""
        wanted = sorted(set(indices))
        values: dict[int, bytes] = {}
        for at in range(0, len(wanted), PCRS_PER_READ):
            part = wanted[at : at + PCRS_PER_READ]
            _, _, digests = self._run("read PCRs", self._esys.pcr_read, _selection(part))
            if len(digests) != len(part):
                raise TpmError(f"TPM: it answered {len(digests)} of the PCRs {part}")
            values.update((index, bytes(digest)) for index, digest in zip(part, digests, strict=True))
        return values

    def extend(self, pcr: int, data: bytes) -> None:
        """Extend a PCR in every allocated bank by that bank's hash of ``data``."""
        digests = TPML_DIGEST_VALUES(
            [
                TPMT_HA(hashAlg=bank, digest=TPMU_HA(**{name: hashlib.new(name, data, usedforsecurity=False).digest()}))
                for bank, name in ((bank, _BANK_HASHES[bank]) for bank in self._banks)
            ]
        )
        self._run(f"extend PCR {pcr}", self._esys.pcr_extend, ESYS_TR(pcr), digests)

    def quote(self, indices: Iterable[int], extra_data: bytes) -> tuple[bytes, bytes]:
        """Quote PCRs of the SHA-256 bank.

        Returns:
            TPMS_ATTEST and TPMT_SIGNATURE as the TPM wrote them.
        """
        selection = _selection(sorted(set(indices)))
        try:
            attest, signature = self._esys.quote(self._ak, selection, TPM2B_DATA(extra_data))
        except TSS2_Exception as error:
            self._broken = True  # the TPM may have been reset under this connection: then the key's handle is gone
            raise _ours(error, "quote") from error
        return bytes(attest), signature.marshal()

    def endorsements(self) -> tuple[Endorsement, ...]:
        """Read each endorsement key that has a certificate in the TPM (TCG EK Credential Profile 2.5)."""
        found = []
        for profile in _EK_TYPES:
            try:
                certificate, template = create_ek_template(profile, NVReadEK(self._esys))
            except ValueError:  # this profile has no certificate here
                continue
            except TSS2_Exception as error:
                raise _ours(error, f"read the certificate of {profile}") from error
            if certificate is not None:
                found.append(Endorsement(profile, certificate, self._public_of(template)))
        return tuple(found)

    def _public_of(self, template: Any) -> bytes:  # noqa: ANN401 -- tpm2_pytss has no type information
        def create() -> bytes:
            handle, public, *_ = self._esys.create_primary(TPM2B_SENSITIVE_CREATE(), template, ESYS_TR.ENDORSEMENT)
            self._esys.flush_context(handle)
            return bytes(public.publicArea.marshal())

        return self._run("create an endorsement key", create)

    def close(self) -> None:
        """Flush the attestation key and end the connection."""
        try:
            if not self._broken:
                self._run("flush the attestation key", self._esys.flush_context, self._ak)
        finally:
            self._esys.close()


def _selection(indices: list[int]) -> Any:  # noqa: ANN401 -- tpm2_pytss has no type information
    return TPML_PCR_SELECTION.parse("sha256:" + ",".join(map(str, indices)))
