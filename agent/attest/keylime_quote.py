"""How the node makes a quote for Keylime: key bound in PCR 16, list and PCR 10 read together, signed by the second attestation key.

The measurement lock of the list's log is held from reading its length until the quote returns. Where another process extends a PCR between
PCR_Read and the quote, both are repeated, at most :data:`MAX_QUOTE_ATTEMPTS` times.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from agent.attest.keylime import BINDING_PCR, KernelList, quote_string
from agent.attest.log import MeasurementLog
from agent.attest.structures import AkKind, parse_quote, pcr_digest
from agent.attest.tpm import Tpm
from agent.attest.tpm_thread import TpmThread
from agent.errors import TpmError

__all__ = ["KEY_TIMEOUT_S", "MAX_QUOTE_ATTEMPTS", "KeylimeQuote", "collect_keylime_quote"]

MAX_QUOTE_ATTEMPTS = 3
KEY_TIMEOUT_S = 60.0  # a discrete TPM may need half a minute to make an RSA key


@dataclass(frozen=True, slots=True)
class KeylimeQuote:
    """A quote and the part of the list that goes with it.

    Attributes:
        quote: in Keylime's form.
        start: index in the list of the first entry that is sent.
        kernel: lines of the kernel's among them.
        entries: the node's among them, in the binary form.
    """

    quote: str
    start: int
    kernel: tuple[str, ...]
    entries: bytes


async def collect_keylime_quote(
    tpm: TpmThread,
    log: MeasurementLog,
    kernel: KernelList,
    *,
    nonce: str,
    pcrs: Collection[int],
    bound: bytes,
    start: int,
) -> KeylimeQuote:
    """Quote the TPM over a nonce of Keylime's.

    Args:
        tpm: the thread that the log uses too.
        log: the log of PCR 10.
        kernel: what stands before it in the list.
        nonce: ASCII; becomes the extra data as it is.
        pcrs: to quote, besides PCR 16.
        bound: what PCR 16 is extended with: the listener's public key.
        start: index in the list of the first wanted entry; past its end the whole list is sent.

    Raises:
        VerificationError, TpmError, HostError: the log or the TPM is not in order.
    """
    async with log.locked() as now:
        first = start if start <= len(kernel.lines) + now.count else 0
        own = max(0, first - len(kernel.lines))

        def job(door: Tpm) -> tuple[str, bytes]:
            return _quote(door, nonce.encode("ascii"), {*pcrs, BINDING_PCR}, bound), log.read(now, own)

        quote, entries = await tpm.call(job, timeout_s=KEY_TIMEOUT_S)
    return KeylimeQuote(quote, first, kernel.lines[first:], entries)


def _quote(tpm: Tpm, nonce: bytes, pcrs: set[int], bound: bytes) -> str:
    tpm.reset(BINDING_PCR)
    tpm.extend(BINDING_PCR, bound)
    for _ in range(MAX_QUOTE_ATTEMPTS):
        values = tpm.read_pcrs(pcrs)
        attest, signature = tpm.quote(pcrs, nonce, AkKind.RSA_2048)
        if parse_quote(attest).pcr_digest == pcr_digest(values.values()):
            return quote_string(attest, signature, values)
    raise TpmError(f"TPM: another process extends PCRs: {MAX_QUOTE_ATTEMPTS} quotes did not match what was read")
