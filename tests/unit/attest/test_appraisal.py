"""Appraisal: what holds, what is forged, and which check says so."""

from dataclasses import replace

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest import appraisal
from agent.attest.appraisal import CHECKS, Verified, appraise
from agent.attest.evidence import PcrValues
from agent.attest.measurement import Entry, config_entry, model_entry, replay, unload_entry
from agent.attest.reference import Measurement
from agent.attest.structures import AK_TEMPLATE, RSA_AK_TEMPLATE, ClockInfo
from agent.errors import VerificationError
from tests.support.attest import (
    ENTRIES,
    MODEL,
    PCR,
    POLICY,
    Attester,
    digest,
    expectation,
    state_of,
    with_reference,
)

HONEST = Attester()
EVIDENCE = HONEST.evidence()
OTHER_KEY = ec.derive_private_key(8, ec.SECP256R1())
OTHER_NODE = Attester(key=OTHER_KEY)
CLOCK = HONEST.clock


def _with(evidence=EVIDENCE, **changes):
    return msgspec.structs.replace(evidence, **changes).encode()


def _claims(**changes):
    return _with(claims=msgspec.structs.replace(EVIDENCE.claims, **changes))


def _verified(entries=ENTRIES[:2], **changes):
    fields = {"clock": CLOCK.clock, "reset_count": CLOCK.reset_count, "restart_count": CLOCK.restart_count} | changes
    return Verified(index=len(entries), pcr=replay(entries).hex(), state=state_of(*entries), **fields)


def _flip(data, at=-1):
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def _log(*entries):
    """Sent entries that are not those that the TPM holds."""
    return _with(entries=b"".join(entry.encode(PCR) for entry in entries))


def _values(changes):
    return PcrValues(EVIDENCE.pcrs.sha256 | {index: value.hex() for index, value in changes.items()})


def _unsorted(evidence):
    return PcrValues({**evidence.pcrs.sha256, 0: evidence.pcrs.sha256[1], 1: evidence.pcrs.sha256[0]})


def _resigned():
    other = OTHER_NODE.evidence()
    return msgspec.structs.replace(other, signature=HONEST.sign(other.attest)).encode()


def _consistent(*entries, real=ENTRIES):
    """Entries with claims that fit them, quoted by a TPM that holds others."""
    return HONEST.evidence(entries, pcrs={PCR: replay(real)}).encode()


def _enrolled(template):
    """Honest Evidence by a key of these attributes, algorithms and curve, enrolled as it is."""
    attester = Attester(template=template)
    return attester.evidence().encode(), expectation(attester)


ATTRIBUTES = int.from_bytes(AK_TEMPLATE[4:8])
NOT_THE_AK = {  # TPMA_OBJECT: TPM 2.0 Library, Part 2, 8.3
    "loaded from software: without FIXEDTPM and FIXEDPARENT": ATTRIBUTES & ~0x12,
    "made by software: without SENSITIVEDATAORIGIN": ATTRIBUTES & ~0x20,
    "signs anything: without RESTRICTED": ATTRIBUTES & ~0x10000,
    "also decrypts": ATTRIBUTES | 0x20000,
    "can't sign": ATTRIBUTES & ~0x40000,
    "without USERWITHAUTH": ATTRIBUTES & ~0x40,
    "without NODA": ATTRIBUTES & ~0x400,
}
UNAPPROVED = (*ENTRIES[:3], model_entry("m", "1", "model.onnx", digest("x")))
UPPER_CASE = model_entry("M", "1", "model.onnx", MODEL)
FOREIGN = Entry("/usr/bin/sh", MODEL)
ASKED = expectation()
FORGED = [
    # check, how it was forged, the bytes, what the Verifier expects
    ("encoding", "no JSON", b"{", ASKED),
    ("encoding", "attest cut short", _with(attest=EVIDENCE.attest[:-1]), ASKED),
    ("signature-scheme", "bytes after the signature", _with(signature=EVIDENCE.signature + b"\0"), ASKED),
    ("attest-type", "made by software: another magic", Attester(magic=0xFF544346).evidence().encode(), ASKED),
    ("attest-type", "a certified creation, not a quote", Attester(kind=0x801A).evidence().encode(), ASKED),
    (
        "ak-template",
        "enrolled key without RESTRICTED",
        EVIDENCE.encode(),
        expectation(ak_public=_flip(HONEST.ak_public, 5)),
    ),
    *(
        ("ak-template", words, *_enrolled(AK_TEMPLATE[:4] + attributes.to_bytes(4) + AK_TEMPLATE[8:]))
        for words, attributes in NOT_THE_AK.items()
    ),
    ("ak-template", "an RSA key", EVIDENCE.encode(), expectation(ak_public=RSA_AK_TEMPLATE + b"\1\0" + b"\xff" * 256)),
    ("ak-template", "a point off the curve", EVIDENCE.encode(), expectation(ak_public=_flip(HONEST.ak_public))),
    ("signer", "the evidence of another node", OTHER_NODE.evidence(node="node-2").encode(), ASKED),
    ("signer", "the enrolled key's signature below another's quote", _resigned(), ASKED),
    ("signer", "another TPM's key", Attester(key=OTHER_KEY).evidence().encode(), ASKED),
    ("signer", "a key in the owner hierarchy", Attester(hierarchy=0x40000001).evidence().encode(), ASKED),
    ("signature-scheme", "RSASSA", Attester(scheme=(0x0014, 0x000B)).evidence().encode(), ASKED),
    ("signature-scheme", "over SHA-1", Attester(scheme=(0x0018, 0x0004)).evidence().encode(), ASKED),
    ("signature", "another key's signature", _with(signature=Attester(key=OTHER_KEY).sign(EVIDENCE.attest)), ASKED),
    ("signature", "one bit of the clock", _with(attest=_flip(EVIDENCE.attest, 85)), ASKED),
    ("extra-data", "an older nonce: replayed", EVIDENCE.encode(), expectation(nonce=bytes(32))),
    ("extra-data", "a nonce of its own", HONEST.evidence(nonce=bytes(32)).encode(), ASKED),
    ("extra-data", "another policy named", _claims(policy_sha256="dd" * 32), ASKED),
    ("extra-data", "another control key", _claims(control_spki_sha256="dd" * 32), ASKED),
    ("extra-data", "another count", _claims(count=3), ASKED),
    ("extra-data", "another node's name", _claims(node="node-2"), ASKED),
    ("extra-data", "another inference key", _claims(inference_spki_sha256="dd" * 32), ASKED),
    ("extra-data", "posture made better", _claims(posture={"secure_boot": True, "debug": False}), ASKED),
    ("extra-data", "a claim left out", _claims(audit=msgspec.UNSET), ASKED),
    ("spki", "Evidence relayed from another node", EVIDENCE.encode(), expectation(control_spki_sha256="ee" * 32)),
    (
        "spki",
        "another inference listener",
        EVIDENCE.encode(),
        expectation(inference_spki_sha256=frozenset({"ee" * 32})),
    ),
    ("spki", "another control listener", HONEST.evidence(control_spki_sha256="ee" * 32).encode(), ASKED),
    ("spki", "no key claimed", HONEST.evidence(control_spki_sha256=msgspec.UNSET).encode(), ASKED),
    ("pcr-selection", "the SHA-1 bank", Attester(bank=0x0004).evidence().encode(), ASKED),
    (
        "pcr-selection",
        "without the measurement PCR",
        Attester(selected=(*range(10), 11, 13)).evidence().encode(),
        ASKED,
    ),
    ("pcr-selection", "a PCR more", Attester(selected=(*range(12), 14)).evidence().encode(), ASKED),
    (
        "pcr-selection",
        "another measurement PCR than demanded",
        EVIDENCE.encode(),
        expectation(reference=with_reference(measurement=Measurement(13))),
    ),
    ("pcr-selection", "PCR 16 instead", Attester(selected=(*range(10), 11, 16)).evidence().encode(), ASKED),
    ("pcr-selection", "nothing quoted", Attester(selected=()).evidence().encode(), ASKED),
    ("pcr-digest", "two values exchanged", _with(pcrs=_unsorted(EVIDENCE)), ASKED),
    ("pcr-digest", "the measurement PCR's value exchanged", _with(pcrs=_values({PCR: replay(UNAPPROVED)})), ASKED),
    ("pcr-digest", "a value more", _with(pcrs=_values({12: bytes(32)})), ASKED),
    ("pcr-digest", "a value left out", _with(pcrs=PcrValues({0: "00" * 32})), ASKED),
    ("clock", "the TPM was cleared", EVIDENCE.encode(), expectation(verified=_verified(reset_count=4))),
    (
        "clock",
        "an earlier boot's quote",
        EVIDENCE.encode(),
        expectation(verified=_verified((), reset_count=9, clock=0)),
    ),
    (
        "clock",
        "the clock went back across a reset",
        EVIDENCE.encode(),
        expectation(verified=_verified(reset_count=2, clock=1001)),
    ),
    ("clock", "the clock is set past any time", Attester(clock=replace(CLOCK, clock=2**63)).evidence().encode(), ASKED),
    ("clock", "the clock went back", EVIDENCE.encode(), expectation(verified=_verified(clock=1001))),
    ("clock", "restarts went back in one boot", EVIDENCE.encode(), expectation(verified=_verified(restart_count=1))),
    ("log-replay", "the last entry left out", _log(*ENTRIES[:-1]), ASKED),
    ("log-replay", "an entry more", _log(*ENTRIES, ENTRIES[-1]), ASKED),
    ("log-replay", "two entries exchanged", _log(ENTRIES[0], ENTRIES[2], ENTRIES[1], ENTRIES[3]), ASKED),
    ("log-replay", "another digest", _log(*ENTRIES[:3], model_entry("m", "1", "model.onnx", digest("x"))), ASKED),
    ("log-replay", "no entries", _with(entries=b""), ASKED),
    ("log-replay", "an entry of another PCR", _with(entries=ENTRIES[0].encode(10)), ASKED),
    ("log-replay", "the last entry left out, and the count", _consistent(*ENTRIES[:-1]), ASKED),
    ("log-replay", "a middle entry left out, and the count", _consistent(*ENTRIES[:2], ENTRIES[3]), ASKED),
    ("log-replay", "entries reordered behind the TPM's back", _consistent(*ENTRIES[:2], *ENTRIES[:1:-1]), ASKED),
    ("log-replay", "an entry appended that was never extended", _consistent(*ENTRIES, ENTRIES[-1]), ASKED),
    ("log-replay", "an unload that was never extended", _consistent(*ENTRIES, unload_entry("m", "1")), ASKED),
    ("log-replay", "an approved digest in a bad one's place", _consistent(*ENTRIES, real=UNAPPROVED), ASKED),
    ("log-replay", "the same path, another case", _consistent(*ENTRIES[:3], UPPER_CASE), ASKED),
    ("log-replay", "an extend that is in no log", _consistent(*ENTRIES, real=(*ENTRIES, ENTRIES[-1])), ASKED),
    ("log-replay", "an entry's template digest altered", _with(entries=_flip(EVIDENCE.entries, 4)), ASKED),
    ("log-replay", "a path that no agent measures", HONEST.evidence((*ENTRIES, FOREIGN)).encode(), ASKED),
    ("log-replay", "a second boot_aggregate", HONEST.evidence((*ENTRIES, ENTRIES[0])).encode(), ASKED),
    (
        "log-replay",
        "a count of its own",
        HONEST.evidence(count=3).encode(),
        ASKED,
    ),
    (
        "log-replay",
        "nothing new, though the PCR moved",
        HONEST.evidence((*ENTRIES, UNAPPROVED[-1]), start=4, count=0).encode(),
        expectation(verified=_verified(ENTRIES)),
    ),
    (
        "log-replay",
        "the log shortened and begun again",
        HONEST.evidence(ENTRIES[:2], start=2).encode(),
        expectation(verified=_verified(ENTRIES)),
    ),
    (
        "log-replay",
        "a start of its own choice",
        EVIDENCE.encode(),
        expectation(reference=with_reference(measurement=Measurement(PCR, "11" * 32))),
    ),
    ("log-replay", "the beginning kept back", HONEST.evidence(start=2).encode(), ASKED),
    ("log-replay", "a part skipped", HONEST.evidence(start=3).encode(), expectation(verified=_verified())),
    (
        "log-replay",
        "continued across a reset",
        HONEST.evidence(start=2).encode(),
        expectation(verified=_verified(reset_count=2)),
    ),
    (
        "log-replay",
        "continued from another beginning",
        HONEST.evidence(start=2).encode(),
        expectation(verified=_verified((ENTRIES[0], config_entry(POLICY)))),
    ),
    ("log-replay", "no boot_aggregate", HONEST.evidence(ENTRIES[1:]).encode(), ASKED),
]  # fmt: skip -- a table


@pytest.mark.parametrize(("check", "how", "evidence", "expect"), FORGED, ids=[f"{row[0]}: {row[1]}" for row in FORGED])
def test_forged_evidence_is_none_and_names_its_check(check, how, evidence, expect):
    """Forged Evidence gives status none, the check that it was forged against, and nothing to continue from."""
    result = appraise(evidence, expect)
    assert result.status == "none", how
    assert result.failed is not None
    assert result.failed.name == check
    assert result.verified is None
    assert not result.retry
    outcomes = [found.outcome for found in result.checks]
    assert set(outcomes[CHECKS.index(check) + 1 :]) == {"skipped"}
    with pytest.raises(VerificationError) as raised:
        result.require()
    assert raised.value.check == check


def test_every_check_before_the_state_is_attacked():
    """The table has a row for each check of authenticity."""
    assert {row[0] for row in FORGED} == set(CHECKS[: CHECKS.index("models")])


def test_honest_evidence_of_an_approved_state_is_affirming():
    """All checks are ok, in their order, and the result can be continued."""
    result = appraise(EVIDENCE.encode(), ASKED)
    assert result.status == "affirming"
    assert [check.name for check in result.checks] == list(CHECKS)
    assert {check.outcome for check in result.checks} == {"ok"}
    assert result.claims == EVIDENCE.claims
    assert msgspec.structs.replace(result.require(), judgement=None) == _verified(ENTRIES)


def test_without_a_connection_the_peer_is_not_checked():
    """Evidence from a file says so instead of claiming that its peer was checked."""
    result = appraise(EVIDENCE.encode(), expectation(control_spki_sha256=None, inference_spki_sha256=None))
    spki = result.checks[CHECKS.index("spki")]
    assert (result.status, spki.outcome) == ("affirming", "skipped")


def test_an_unsafe_clock_is_a_retry():
    """After a loss of power the answer is neither trust nor distrust."""
    result = appraise(Attester(clock=replace(CLOCK, safe=False)).evidence().encode(), ASKED)
    assert (result.status, result.retry) == ("none", True)
    assert result.failed is not None
    assert (result.failed.name, result.failed.outcome) == ("clock", "retry")


def test_a_cleared_tpm_is_not_a_retry():
    """A resetCount that fell is named also while the clock is unsafe."""
    forged = Attester(clock=ClockInfo(0, 0, 0, safe=False)).evidence().encode()
    result = appraise(forged, expectation(verified=_verified()))
    assert result.failed is not None
    assert (result.failed.outcome, "enrol again" in result.failed.words) == ("failed", True)


def test_a_poll_continues_from_the_last_verified_index():
    """Entries from the last index on give the same result as the whole log."""
    part = appraise(HONEST.evidence(start=2).encode(), expectation(verified=_verified()))
    assert part.status == "affirming"
    assert part.require() == appraise(EVIDENCE.encode(), ASKED).require()


def test_a_poll_may_have_nothing_new():
    """A log without new entries is verified by its PCR alone."""
    result = appraise(HONEST.evidence(start=4).encode(), expectation(verified=_verified(ENTRIES)))
    assert (result.status, result.require().index) == ("affirming", 4)


def test_a_poll_may_begin_again():
    """The whole log may be sent although a part is verified already."""
    assert appraise(EVIDENCE.encode(), expectation(verified=_verified())).status == "affirming"


def test_after_a_reboot_restart_count_may_fall():
    """A greater resetCount starts a new log, and restartCount from zero."""
    before = _verified(reset_count=2, restart_count=9)
    assert appraise(EVIDENCE.encode(), expectation(verified=before)).status == "affirming"


def test_after_a_resume_restart_count_rises_in_the_same_boot():
    """A suspended and resumed node continues its log."""
    resumed = Attester(clock=replace(CLOCK, restart_count=5))
    found = appraise(resumed.evidence(start=2).encode(), expectation(verified=_verified(restart_count=4)))
    assert (found.status, found.require().restart_count) == ("affirming", 5)


def test_after_a_reset_the_log_is_asked_from_its_beginning():
    """Entries from the old index are refused with words that say what to ask for."""
    result = appraise(HONEST.evidence(start=2).encode(), expectation(verified=_verified(reset_count=2)))
    assert result.failed is not None
    assert (result.failed.name, "ask from 0" in result.failed.words) == ("log-replay", True)


def test_a_log_over_the_limit_is_refused(monkeypatch):
    """Continued polls can't grow a log without end."""
    monkeypatch.setattr(appraisal, "MAX_LOG_ENTRIES", 3)
    result = appraise(HONEST.evidence(start=2).encode(), expectation(verified=_verified()))
    assert result.failed is not None
    assert (result.failed.name, "more than" in result.failed.words) == ("log-replay", True)
