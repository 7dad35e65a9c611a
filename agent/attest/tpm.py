"""The only door to the TPM (``tpm2_pytss``).

Rules:

1. An attestation key is a primary key of the endorsement hierarchy from a fixed template: the same TPM makes the same
   key again, so nothing is stored. A TPM that makes another key than the enrolled one was cleared.
2. An extend goes to every allocated bank, each with its own hash of the same data.
3. A credential is activated under the policy that the default endorsement templates hold: PolicySecret of the endorsement hierarchy. The
   session and the endorsement key are flushed whatever happens.
4. Of what lies in NV, sizes are asked for before contents: anybody who knows the owner's authorization can write there.
5. The door blocks; :mod:`agent.attest.tpm_thread` keeps it off the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_HC,
    TPM2_SE,
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_ID_OBJECT,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMA_NV,
    TPML_DIGEST_VALUES,
    TPML_PCR_SELECTION,
    TPMT_HA,
    TPMT_PUBLIC,
    TPMT_SYM_DEF,
    TPMU_HA,
    TSS2_Exception,
)
from tpm2_pytss.utils import NVReadEK, create_ek_template

from agent.attest.enrolment import MAX_EK_CHAIN_BYTES, split_certificates, without_padding
from agent.attest.structures import AkKind, ClockInfo, parse_ak_public, parse_rsa_ak_public
from agent.errors import TpmError, VerificationError

__all__ = ["DEFAULT_EK_PROFILES", "EK_PROFILES", "Endorsement", "Tpm", "TpmClearedError"]

MAX_TRANSIENT_HANDLES = 64
MAX_BANKS = 16
MAX_EK_CHAIN_INDICES = 256  # 0x01c00100 to 0x01c001ff (TCG EK Credential Profile 2.5)
PCRS_PER_READ = 8  # TPM2_PCR_Read answers with at most 8 digests

_EK_CHAIN_INDEX = 0x01C00100
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
EK_PROFILES = ("EK-RSA2048", "EK-ECC256", "EK-HIGH-RSA2048", "EK-HIGH-ECC256", "EK-HIGH-ECC384")
DEFAULT_EK_PROFILES = ("EK-RSA2048", "EK-ECC256")  # whose policy is PolicySecret of the endorsement hierarchy
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
            self._keys: dict[AkKind, tuple[Any, bytes]] = {}
            _, self.ak_public = self._key(AkKind.ECC_P256)
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

    def _key(self, kind: AkKind) -> tuple[Any, bytes]:
        """Return handle and TPMT_PUBLIC of an attestation key; it is made where this connection has not made it yet."""
        if kind not in self._keys:
            self._keys[kind] = self._create_ak(kind)
        return self._keys[kind]

    def _create_ak(self, kind: AkKind) -> tuple[Any, bytes]:
        ecc = kind is AkKind.ECC_P256
        template, _ = TPMT_PUBLIC.unmarshal(kind.value + bytes(4 if ecc else 2))  # an empty point, or modulus
        handle, public, *_ = self._run(
            "create the attestation key",
            self._esys.create_primary,
            TPM2B_SENSITIVE_CREATE(),
            TPM2B_PUBLIC(publicArea=template),
            ESYS_TR.ENDORSEMENT,
        )
        marshaled = bytes(public.publicArea.marshal())
        return handle, parse_ak_public(marshaled).marshaled if ecc else parse_rsa_ak_public(marshaled)

    def rsa_ak_public(self) -> bytes:
        """Return the TPMT_PUBLIC of the second attestation key; making it may take a discrete TPM many seconds."""
        return self._key(AkKind.RSA_2048)[1]

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

    def reset(self, pcr: int) -> None:
        """Set a PCR to zero in every bank, where the TPM lets locality 0 do so: 16 and 23."""
        self._run(f"reset PCR {pcr}", self._esys.pcr_reset, ESYS_TR(pcr))

    def quote(self, indices: Iterable[int], extra_data: bytes, ak: AkKind = AkKind.ECC_P256) -> tuple[bytes, bytes]:
        """Quote PCRs of the SHA-256 bank by an attestation key.

        Returns:
            TPMS_ATTEST and TPMT_SIGNATURE as the TPM wrote them.
        """
        selection = _selection(sorted(set(indices)))
        key, _ = self._key(ak)
        try:
            attest, signature = self._esys.quote(key, selection, TPM2B_DATA(extra_data))
        except TSS2_Exception as error:
            self._broken = True  # the TPM may have been reset under this connection: then the key's handle is gone
            raise _ours(error, "quote") from error
        return bytes(attest), signature.marshal()

    def endorsements(self, profiles: Iterable[str] = EK_PROFILES) -> tuple[Endorsement, ...]:
        """Read each endorsement key that has a certificate in the TPM (TCG EK Credential Profile 2.5); each is made, which takes its time."""
        found = []
        for profile in profiles:
            try:
                certificate, template = create_ek_template(profile, NVReadEK(self._esys))
            except ValueError:  # this profile has no certificate here
                continue
            except TSS2_Exception as error:
                raise _ours(error, f"read the certificate of {profile}") from error
            if certificate is not None:
                found.append(Endorsement(profile, without_padding(certificate), self._public_of(template)))
        return tuple(found)

    def ek_chain(self) -> tuple[bytes, ...]:
        """Read the intermediate certificates (DER) that the TPM's maker left in NV.

        They stand from index 0x01c00100 on; the first that is missing, not written or not readable without an authorization ends them.

        Raises:
            TpmError: the TPM did not do its part.
            VerificationError: ``ek-chain``: over :data:`~agent.attest.enrolment.MAX_EK_CHAIN_BYTES`, or no certificates.
        """
        _, found = self._run(
            "list NV indices", self._esys.get_capability, TPM2_CAP.HANDLES, _EK_CHAIN_INDEX, MAX_EK_CHAIN_INDICES
        )
        data = b""
        for expected, index in enumerate(found.data.handles, _EK_CHAIN_INDEX):
            size = self._nv_size(int(index)) if index == expected else 0
            if not size:
                break
            if len(data) + size > MAX_EK_CHAIN_BYTES:
                raise VerificationError("ek-chain", f"NV holds more than {MAX_EK_CHAIN_BYTES} bytes of certificates")
            data += self._run(f"read NV index {index:#x}", NVReadEK(self._esys), index)
        return split_certificates(data)

    def _nv_size(self, index: int) -> int:
        """Return how many bytes can be read from an NV index; none where it is not written, or wants an authorization."""
        public = self._run(
            f"look at NV index {index:#x}",
            lambda: self._esys.nv_read_public(self._esys.tr_from_tpmpublic(index))[0].nvPublic,
        )
        readable = TPMA_NV.WRITTEN | TPMA_NV.AUTHREAD
        return int(public.dataSize) if public.attributes & readable == readable else 0

    def _public_of(self, template: Any) -> bytes:  # noqa: ANN401 -- tpm2_pytss has no type information
        with self._endorsement_key(template) as (_, public):
            return bytes(public.publicArea.marshal())

    def ek_public(self, profile: str) -> bytes:
        """Return the TPMT_PUBLIC of a default endorsement key, with or without a certificate.

        Raises:
            TpmError: the TPM refused, or the profile is none of the default ones.
        """
        return self._public_of(self._ek_template(profile))

    def activate_credential(
        self, ak: AkKind, ek_profile: str, credential_blob: bytes, encrypted_secret: bytes
    ) -> bytes:
        """Prove that an attestation key is in the TPM of an endorsement key: decrypt what was made for the two of them.

        Args:
            ak: the key that the credential names.
            ek_profile: ``EK-RSA2048`` or ``EK-ECC256``: the key that it was encrypted to.
            credential_blob: TPM2B_ID_OBJECT of MakeCredential.
            encrypted_secret: TPM2B_ENCRYPTED_SECRET of MakeCredential.

        Returns:
            The credential.

        Raises:
            TpmError: it is not for these keys, or no such thing, or the TPM did not do its part.
        """
        template = self._ek_template(ek_profile)
        key, _ = self._key(ak)
        blob = _unmarshal(TPM2B_ID_OBJECT, credential_blob)
        secret = _unmarshal(TPM2B_ENCRYPTED_SECRET, encrypted_secret)
        with self._endorsement_key(template) as (ek, _), self._endorsement_session() as session:
            found = self._run(
                "activate a credential",
                lambda: self._esys.activate_credential(
                    key, ek, blob, secret, session1=ESYS_TR.PASSWORD, session2=session
                ),
            )
        return bytes(found)

    def _ek_template(self, profile: str) -> Any:  # noqa: ANN401 -- as above
        if profile not in DEFAULT_EK_PROFILES:
            raise TpmError(f"TPM: {profile[:32]!r} is none of the endorsement keys {', '.join(DEFAULT_EK_PROFILES)}")
        return self._run(f"read the template of {profile}", create_ek_template, profile, NVReadEK(self._esys))[1]

    @contextmanager
    def _endorsement_key(self, template: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 -- as above
        handle, public, *_ = self._run(
            "create an endorsement key",
            self._esys.create_primary,
            TPM2B_SENSITIVE_CREATE(),
            template,
            ESYS_TR.ENDORSEMENT,
        )
        try:
            yield handle, public
        finally:
            self._flush(handle)

    @contextmanager
    def _endorsement_session(self) -> Iterator[Any]:
        session = self._run(
            "start a session",
            self._esys.start_auth_session,
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.POLICY,
            TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL),
            TPM2_ALG.SHA256,
        )
        try:
            self._run("satisfy the endorsement key's policy", self._esys.policy_secret, ESYS_TR.ENDORSEMENT, session)
            yield session
        finally:
            self._flush(session)

    def _flush(self, handle: Any) -> None:  # noqa: ANN401 -- as above
        if not self._broken:
            self._run("flush a context", self._esys.flush_context, handle)

    def close(self) -> None:
        """Flush the attestation keys and end the connection."""
        try:
            for handle, _ in self._keys.values():
                self._flush(handle)
        finally:
            self._esys.close()


def _unmarshal(kind: Any, data: bytes) -> Any:  # noqa: ANN401 -- tpm2_pytss has no type information
    try:
        value, used = kind.unmarshal(data)
    except TSS2_Exception as error:
        raise _ours(error, f"read a {kind.__name__}") from error
    if used != len(data):
        raise TpmError(f"TPM: {len(data)} bytes are no {kind.__name__}")
    return value


def _selection(indices: list[int]) -> Any:  # noqa: ANN401 -- tpm2_pytss has no type information
    return TPML_PCR_SELECTION.parse("sha256:" + ",".join(map(str, indices)))
