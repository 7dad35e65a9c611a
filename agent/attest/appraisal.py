"""Appraisal of Evidence by a Verifier: pure, no I/O; for the command line, the controller and auditors.

Every check has a stable name (:data:`CHECKS`) and they run in that order:

1.  ``encoding``: sizes, JSON, base64, the TPM's structures.
2.  ``attest-type``: the TPM made the structure (magic) and it is a quote.
3.  ``ak-template``: the enrolled key equals the fixed template.
4.  ``signer``: the quote's qualified signer is that key, in the endorsement hierarchy.
5.  ``signature-scheme``: ECDSA over SHA-256.
6.  ``signature``: it is that key's, over these bytes.
7.  ``extra-data``: made of the Verifier's nonce and these claims.
8.  ``spki``: the keys in the claims are those that the peers of these connections have shown.
9.  ``pcr-selection``: the *attested* selection is the demanded one.
10. ``pcr-digest``: the PCR values are the attested ones.
11. ``clock``: never behind the last verified one, nor past what it can have come to; resetCount does not fall. An unsafe clock is *retry later*.
12. ``log-replay``: the entries continue the verified log, are as many as claimed and replay to the quoted PCR.
13. ``models``, 14. ``refused``, 15. ``config``, 16. ``policy``: the replayed state against the Reference Values
    (:mod:`agent.attest.findings`).
17. ``boot-aggregate``, 18. ``boot-pcrs``: what was booted.

Status, in the words of EAR (draft-ietf-rats-ear):

- ``none``: one of 1-12 failed. Nothing is known about the node, what follows is skipped, and nothing was verified.
- ``contraindicated``: the Evidence is true and shows what no operator approved.
- ``warning``: true, in order, but something needs a look.
- ``affirming``: true and in order.

:func:`appraise` raises for no Evidence, however forged: the answer is the Appraisal. :meth:`Appraisal.require` turns it
into a VerificationError for a caller that wants nothing else.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from agent.attest.evidence import Claims, Evidence, HexDigest, extra_data, quoted_pcrs
from agent.attest.findings import Check, Judgement, compare, judge
from agent.attest.log_state import LogState
from agent.attest.measurement import MAX_LOG_ENTRIES, Entry, replay_log
from agent.attest.reference import ReferenceValues
from agent.attest.structures import (
    ALG_SHA256,
    ClockInfo,
    PcrSelection,
    Quote,
    parse_ak_public,
    parse_quote,
    parse_signature,
    pcr_digest,
)
from agent.errors import VerificationError

__all__ = ["CHECKS", "Appraisal", "Check", "Expectation", "StateNeededError", "Verified", "appraise"]

CHECKS = (
    "encoding",
    "attest-type",
    "ak-template",
    "signer",
    "signature-scheme",
    "signature",
    "extra-data",
    "spki",
    "pcr-selection",
    "pcr-digest",
    "clock",
    "log-replay",
    "models",
    "refused",
    "config",
    "policy",
    "boot-aggregate",
    "boot-pcrs",
)

MAX_CLOCK_MS = 2**63 - 1
"""A TPM's clock has 64 bits, and its owner may set it ahead; a Verifier's database has one bit less."""

_SKIPPED = {name: Check(name, "skipped") for name in CHECKS}
_OK = {name: Check(name, "ok") for name in CHECKS}

Status: TypeAlias = Literal["affirming", "warning", "contraindicated", "none"]


class Verified(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a node's log was verified: kept by the Verifier, handed in with the next Evidence.

    Attributes:
        index: entries verified, so the next ``from``.
        pcr: what they replay to.
        state: what they say is in force. A Verifier may leave it out and hand it in when it is asked for.
        clock, reset_count, restart_count: of the quote that covered them.
        judgement: what that state is, held against the Reference Values.
    """

    index: int
    pcr: HexDigest
    state: LogState | None
    clock: int
    reset_count: int
    restart_count: int
    judgement: Judgement | None = None


class StateNeededError(LookupError):
    """``verified.state`` was left out, and entries were added to the log or the Reference Values are others: appraise again with it."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the Verifier knows without the node.

    Attributes:
        nonce: the one that it sent.
        ak_public: TPMT_PUBLIC of the enrolled attestation key.
        reference: what the operator approved.
        control_spki_sha256: key shown by the peer that sent the Evidence; None when it did not come over a connection.
        inference_spki_sha256: keys shown by the inference listener, any of which may be claimed; None when not looked at.
        verified: result of the last appraisal of this node, if any.
        enrolled_pcrs: boot PCRs at enrolment by index, lower-case hex.
    """

    nonce: bytes
    ak_public: bytes
    reference: ReferenceValues
    control_spki_sha256: str | None = None
    inference_spki_sha256: frozenset[str] | None = None
    verified: Verified | None = None
    enrolled_pcrs: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """The result.

    Attributes:
        status: see the module's text.
        checks: all of them, in order.
        claims: set once they are authentic (``extra-data`` is ok).
        verified: set once ``log-replay`` is ok: to be kept for the next appraisal.
    """

    status: Status
    checks: tuple[Check, ...]
    claims: Claims | None
    verified: Verified | None

    @property
    def failed(self) -> Check | None:
        """The first check that is ``failed`` or ``retry``."""
        return next((check for check in self.checks if check.outcome in {"failed", "retry"}), None)

    @property
    def retry(self) -> bool:
        """Whether the same node may well pass later: its clock is not safe yet."""
        return any(check.outcome == "retry" for check in self.checks)

    def require(self) -> Verified:
        """Return what was verified.

        Raises:
            VerificationError: a check failed; its name is the first such check's.
        """
        if self.failed is not None:
            raise VerificationError(self.failed.name, self.failed.words)
        assert self.verified is not None  # noqa: S101 -- log-replay is ok, so it is set
        return self.verified


class _RetryLaterError(VerificationError):
    """The one refusal that is nobody's fault."""


_Ok: TypeAlias = Callable[[str], None]


def appraise(evidence: bytes, expect: Expectation) -> Appraisal:
    """Appraise Evidence as it came over the wire; raises nothing for it, see the module's text.

    Raises:
        StateNeededError: the caller left the state out of ``verified``, and it is needed.
    """
    checks = dict(_SKIPPED)
    status: Status = "none"
    claims: Claims | None = None
    verified: Verified | None = None

    def ok(name: str) -> None:
        checks[name] = _OK[name]

    try:
        sent, quote = _authenticate(evidence, expect, ok)
        claims = sent.claims
        _check_peers(claims, expect, checks)
        values = _check_pcrs(sent, quote, expect.reference, ok)
        _check_clock(quote.clock, expect.verified)
        ok("clock")
        verified, judgement = _replay(sent, quote.clock, values[expect.reference.measurement.pcr], expect)
        ok("log-replay")
    except _RetryLaterError as error:
        checks[error.check] = Check(error.check, "retry", error.message)
    except VerificationError as error:
        checks[error.check] = Check(error.check, "failed", error.message)
    else:
        # 13-18. What is true is held against what was approved.
        checks |= {
            check.name: check for check in compare(judgement, claims, values, expect.reference, expect.enrolled_pcrs)
        }
        outcomes = {check.outcome for check in checks.values()}
        status = "contraindicated" if "failed" in outcomes else "warning" if "warning" in outcomes else "affirming"
    return Appraisal(status, tuple(checks.values()), claims, verified)


def _authenticate(data: bytes, expect: Expectation, ok: _Ok) -> tuple[Evidence, Quote]:
    # 1. Sizes and encoding.
    evidence = Evidence.decode(data)
    ok("encoding")
    # 2. Magic and type: a restricted key signs foreign data only when it does not begin with the magic.
    quote = parse_quote(evidence.attest)
    ok("attest-type")
    # 3. The enrolled key is one that the TPM made and keeps.
    ak = parse_ak_public(expect.ak_public)
    ok("ak-template")
    # 4. The signer is that key.
    if not hmac.compare_digest(quote.qualified_signer, ak.qualified_name):
        raise VerificationError("signer", "the quote is by another key than the enrolled one, or in another hierarchy")
    ok("signer")
    # 5. The signature's scheme is taken from the signature and must be the key's.
    signature = parse_signature(evidence.signature)
    ok("signature-scheme")
    # 6. The signature.
    ak.verify(signature, evidence.attest)
    ok("signature")
    # 7. Freshness, and the claims with it.
    if not hmac.compare_digest(quote.extra_data, extra_data(expect.nonce, evidence.claims)):
        raise VerificationError("extra-data", "the quote is over another nonce or other claims")
    ok("extra-data")
    return evidence, quote


def _check_peers(claims: Claims, expect: Expectation, checks: dict[str, Check]) -> None:
    # 8. Who answered is who was attested. Without a connection there is nothing to compare.
    if expect.control_spki_sha256 is not None and claims.control_spki_sha256 != expect.control_spki_sha256:
        raise VerificationError("spki", "the control listener's key is not the one in the claims")
    if expect.inference_spki_sha256 is not None and claims.inference_spki_sha256 not in expect.inference_spki_sha256:
        raise VerificationError("spki", "the inference listener's key is not the one in the claims")
    if expect.control_spki_sha256 is not None or expect.inference_spki_sha256 is not None:
        checks["spki"] = _OK["spki"]
    else:
        checks["spki"] = Check("spki", "skipped", "no peer's key was given")


def _check_pcrs(evidence: Evidence, quote: Quote, reference: ReferenceValues, ok: _Ok) -> dict[int, bytes]:
    # 9. The bank and selection are taken from what the TPM signed.
    demanded = quoted_pcrs(reference.measurement.pcr)
    if quote.selections != (PcrSelection(ALG_SHA256, frozenset(demanded)),):
        raise VerificationError("pcr-selection", f"the quote is not over PCRs {demanded} of the SHA-256 bank alone")
    ok("pcr-selection")
    # 10. The values sent beside it are the attested ones.
    values = {index: bytes.fromhex(value) for index, value in sorted(evidence.pcrs.sha256.items())}
    if tuple(values) != demanded or not hmac.compare_digest(pcr_digest(values.values()), quote.pcr_digest):
        raise VerificationError("pcr-digest", "the PCR values sent are not the ones that were quoted")
    ok("pcr-digest")
    return values


def _check_clock(clock: ClockInfo, verified: Verified | None) -> None:
    # 11. Time and resets never run backwards; restartCount may, when resetCount rises.
    if verified is not None and clock.reset_count < verified.reset_count:
        raise VerificationError(
            "clock", f"resetCount fell from {verified.reset_count} to {clock.reset_count}: TPM cleared, enrol again"
        )
    if clock.clock > MAX_CLOCK_MS:
        raise VerificationError("clock", f"the TPM's clock was set to {clock.clock} ms: it never ran so long")
    if not clock.safe:
        raise _RetryLaterError("clock", "the TPM's clock is not safe yet after a loss of power: retry later")
    if verified is None:
        return
    same_boot = clock.reset_count == verified.reset_count
    if clock.clock < verified.clock or (same_boot and clock.restart_count < verified.restart_count):
        raise VerificationError("clock", "the quote is older than the last verified one")


def _replay(evidence: Evidence, clock: ClockInfo, quoted: bytes, expect: Expectation) -> tuple[Verified, Judgement]:
    # 12. The log: from its beginning, or from where it was verified in this same boot.
    claims, before, reference = evidence.claims, expect.verified, expect.reference
    pcr = reference.measurement.pcr
    if claims.start == 0:
        value, before = bytes.fromhex(reference.measurement.start), None
    elif before is not None and (before.reset_count, before.index) == (clock.reset_count, claims.start):
        value = bytes.fromhex(before.pcr)
    else:
        raise VerificationError("log-replay", f"entries from {claims.start} do not continue a verified log: ask from 0")
    entries, value = replay_log(evidence.entries, pcr, value, reference.known)
    if len(entries) != claims.count:
        raise VerificationError("log-replay", f"{len(entries)} entries were sent, {claims.count} are claimed")
    if claims.start + claims.count > MAX_LOG_ENTRIES:
        raise VerificationError("log-replay", f"the log has more than {MAX_LOG_ENTRIES} entries")
    if not hmac.compare_digest(value, quoted):
        raise VerificationError("log-replay", f"the entries do not replay to the quoted PCR {pcr}")
    state, judgement = _state(entries, before, reference)
    verified = Verified(
        index=claims.start + claims.count,
        pcr=value.hex(),
        state=state,
        clock=clock.clock,
        reset_count=clock.reset_count,
        restart_count=clock.restart_count,
        judgement=judgement,
    )
    return verified, judgement


def _state(
    entries: list[Entry], before: Verified | None, reference: ReferenceValues
) -> tuple[LogState | None, Judgement]:
    """Return what the log says now and how that is judged; as before, where neither the log nor the Reference Values changed."""
    if before is None:
        state = LogState().after(entries, at_start=True)
    elif not entries and before.judgement is not None and before.judgement.reference == reference.digest:
        return before.state, before.judgement
    elif before.state is None:
        raise StateNeededError
    else:
        state = before.state.after(entries) if entries else before.state
    return state, judge(state, reference)
