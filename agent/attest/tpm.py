"""The only door to the TPM (``tpm2_pytss``).

Rules:

1. The attestation key is a primary key of the endorsement hierarchy from the fixed template: the same TPM makes the
   same key again, so nothing is stored. A TPM that makes another key than the enrolled one was cleared.
2. An extend goes to every allocated bank, each with its own hash of the same data.
3. :class:`TpmThread` runs everything on one thread, off the event loop, in the order of the calls. A call that does not
   end in time fails, and so do all that wait behind it and all that come before the next attempt: fail closed. The
   stuck thread is left behind with its connection; a new thread with a new connection is tried with a growing delay.
4. A job that was left behind may still take effect: :attr:`TpmThread.outstanding` counts those, and who changes a PCR
   waits until it is zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import queue
import threading
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

__all__ = ["CALL_TIMEOUT_S", "CONNECT_TIMEOUT_S", "Endorsement", "Tpm", "TpmClearedError", "TpmThread"]

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 30.0  # a discrete TPM may need seconds to make a primary key
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 30.0
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


class _Worker:
    """A thread with a connection of its own, made by its first job. Daemonic: a stuck driver must not hold the process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connect: Callable[[], Tpm]) -> None:
        self._loop = loop
        self._connect = connect
        self._jobs: queue.SimpleQueue[tuple[Callable[[Tpm], Any], asyncio.Future[Any]] | None] = queue.SimpleQueue()
        self._tpm: Tpm | None = None
        self._thread = threading.Thread(target=self._serve, name="tpm", daemon=True)
        self.connected = False
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Callable[[Tpm], _T]) -> asyncio.Future[_T]:
        future: asyncio.Future[_T] = self._loop.create_future()
        self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """Let the thread end, and its connection with it, once the job that it is in has ended."""
        self._jobs.put(None)

    def join(self, timeout_s: float | None) -> None:
        self._thread.join(timeout_s)

    def _serve(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            result, failure = None, None
            try:
                if self._tpm is None:
                    self._tpm = self._connect()
                result = job(self._tpm)
            except Exception as error:  # noqa: BLE001 -- carried to the loop's thread and raised where the call is awaited
                failure = error
            self.connected = self._tpm is not None and not self._tpm.broken
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_settle, future, result, failure)
        if self._tpm is not None:
            with contextlib.suppress(TpmError):  # the connection ends, and what it held ends with it
                self._tpm.close()


def _settle(future: asyncio.Future[Any], result: object, failure: Exception | None) -> None:
    if future.done():  # its caller ran out of time or was cancelled
        return
    if failure is None:
        future.set_result(result)
    else:
        future.set_exception(failure)


class TpmThread:
    """A TPM for an event loop. Make it inside the running loop.

    Args:
        tcti: as for :class:`Tpm`.
        enrolled_ak: as for :class:`Tpm`.
        call_timeout_s: longest time for one call.
        connect_timeout_s: the same for a call that must connect first.
        first_retry_s: how long calls fail at once after a failure; doubles with each, up to :data:`MAX_RETRY_S`.
    """

    def __init__(
        self,
        tcti: str,
        enrolled_ak: bytes | None = None,
        *,
        call_timeout_s: float = CALL_TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        first_retry_s: float = FIRST_RETRY_S,
    ) -> None:
        self._connect = lambda: Tpm(tcti, enrolled_ak)
        self._call_timeout_s = call_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._first_retry_s = first_retry_s
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._worker: _Worker | None = None
        self._left_behind: list[_Worker] = []
        self._failures = 0
        self._failure = TpmError("TPM: not connected")
        self._next_attempt = 0.0

    @property
    def outstanding(self) -> int:
        """How many jobs that ran out of time may still take effect."""
        self._left_behind = [worker for worker in self._left_behind if worker.alive]
        return len(self._left_behind)

    @property
    def answering(self) -> bool:
        """Whether the last call was answered, if only by a refusal."""
        return self._failures == 0

    async def call(self, job: Callable[[Tpm], _T]) -> _T:
        """Run a job on the TPM's thread, after those that were called before.

        Raises:
            TpmError: the TPM refused, did not answer in time, can't be reached, or waits for its next attempt.
        """
        async with self._turn:
            worker, limit_s = self._begin()
            try:
                async with asyncio.timeout(limit_s):
                    result = await worker.submit(job)
            except TimeoutError:
                raise self._fail(worker, TpmError(f"TPM: no answer within {limit_s} s")) from None
            except TpmError as error:
                if worker.connected:
                    self._failures = 0
                    raise
                raise self._fail(worker, error) from error
            self._failures = 0
            return result

    def _begin(self) -> tuple[_Worker, float]:
        if self._worker is not None:
            return self._worker, self._call_timeout_s
        wait_s = self._next_attempt - self._loop.time()
        if wait_s > 0:
            raise type(self._failure)(f"{self._failure}; calls fail at once until the next attempt")
        self._worker = _Worker(self._loop, self._connect)
        return self._worker, self._connect_timeout_s

    def _fail(self, worker: _Worker, failure: TpmError) -> TpmError:
        worker.stop()
        self._left_behind.append(worker)
        self._worker = None
        self._next_attempt = self._loop.time() + min(self._first_retry_s * 2**self._failures, MAX_RETRY_S)
        self._failures += 1
        self._failure = failure
        return failure

    async def close(self) -> None:
        """End the connection, or leave a stuck one behind after :data:`CALL_TIMEOUT_S` or what was given for it."""
        async with self._turn:
            if self._worker is not None:
                worker = self._worker
                self._fail(worker, TpmError("TPM: closed"))
                self._next_attempt = math.inf
                await asyncio.to_thread(worker.join, self._call_timeout_s)
