"""Properties of the appraiser over any mutation of honest Evidence and any way to ask for a log."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.attest.appraisal import StateNeededError, appraise
from agent.attest.evidence import Evidence
from agent.attest.measurement import config_entry, model_entry, policy_entry, refused_entry, unload_entry
from agent.attest.structures import parse_signature
from tests.support.attest import (
    CONFIG,
    ENTRIES,
    MODEL,
    POLICY,
    REFERENCE,
    Attester,
    digest,
    expectation,
    state_of,
    with_reference,
)

HONEST = Attester()
EVIDENCE = HONEST.evidence()
ASKED = expectation()
BAD = digest("bad")
OTHER_REFERENCE = with_reference(withdrawn=REFERENCE.models)


def _values(evidence):
    """Everything that Evidence says; one signature has several encodings."""
    return msgspec.structs.replace(evidence, signature=b""), parse_signature(evidence.signature)


def _mutation(size):
    """Return a strategy of changes: bytes replaced, cut out or put in, here and there."""
    at = st.integers(0, size)
    return st.lists(st.tuples(at, st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)


def _mutated(data, changes):
    changed = bytearray(data)
    for at, gone, new in changes:
        changed[at : at + gone] = new
    return bytes(changed)


def _holds(wire):
    result = appraise(wire, ASKED)
    if result.status == "none":
        assert result.verified is None
    else:
        assert _values(Evidence.decode(wire)) == _values(EVIDENCE)
        assert result.require().state == state_of(*ENTRIES)


@given(_mutation(len(EVIDENCE.encode())))
def test_mutated_evidence_is_none_unless_it_says_the_same(changes):
    """Bytes changed, cut out or put in on the wire give ``none``, or Evidence of the very same values."""
    _holds(_mutated(EVIDENCE.encode(), changes))


@given(st.sampled_from(["attest", "signature", "entries"]), st.data())
def test_a_mutated_part_is_none_unless_it_says_the_same(part, data):
    """The same below the JSON and its base64: in the TPM's structures and in the log."""
    whole = getattr(EVIDENCE, part)
    changes = data.draw(_mutation(len(whole)))
    _holds(msgspec.structs.replace(EVIDENCE, **{part: _mutated(whole, changes)}).encode())


@given(_mutation(len(HONEST.ak_public)))
def test_a_mutated_key_is_none_unless_it_is_the_same(changes):
    """No other bytes are taken for the enrolled key."""
    key = _mutated(HONEST.ak_public, changes)
    if key != HONEST.ak_public:
        assert appraise(EVIDENCE.encode(), expectation(ak_public=key)).status == "none"


_ENTRY = st.sampled_from(
    [
        config_entry(CONFIG),
        config_entry(BAD),
        policy_entry("r1", POLICY),
        policy_entry("r2", BAD),
        model_entry("m", "1", "model.onnx", MODEL),
        model_entry("m", "2", "model.onnx", BAD),
        refused_entry("m", "1", "model.onnx", BAD),
        unload_entry("m", "1"),
        unload_entry("m", "2"),
    ]
)


def _polled(log, verified):
    start = verified.index if verified is not None else 0
    policy = state_of(*log).policy or msgspec.UNSET
    wire = HONEST.evidence(log, start=start, policy_sha256=policy).encode()
    return appraise(wire, expectation(verified=verified))


@given(st.lists(_ENTRY, max_size=12), st.lists(st.integers(1, 16), max_size=6))
def test_any_split_of_a_log_is_appraised_as_the_whole(new, cuts):
    """Polled at any moments, a log ends in the findings and the state that one poll of the whole would give."""
    log = (*ENTRIES, *new)
    verified = None
    for end in sorted(min(cut, len(log)) for cut in cuts):
        verified = _polled(log[:end], verified).verified
    stepped, whole = _polled(log, verified), _polled(log, None)
    assert whole.verified is not None
    assert (stepped.status, stepped.checks, stepped.verified) == (whole.status, whole.checks, whole.verified)


@given(st.lists(_ENTRY, max_size=6), st.lists(_ENTRY, max_size=3), st.sampled_from([REFERENCE, OTHER_REFERENCE]))
def test_a_state_left_out_is_asked_for_or_not_needed(old, new, reference):
    """Without it the appraisal is what it would be with it, or it is asked for: never anything else."""
    before = _polled([*ENTRIES, *old], None).verified
    assert before is not None
    log = [*ENTRIES, *old, *new]
    asked = expectation(verified=before, reference=reference)
    evidence = HONEST.evidence(log, start=before.index, policy_sha256=state_of(*log).policy).encode()
    whole = appraise(evidence, asked)
    left_out = dataclasses.replace(asked, verified=msgspec.structs.replace(before, state=None))
    if new or reference is not REFERENCE:
        with pytest.raises(StateNeededError):
            appraise(evidence, left_out)
    else:
        found = appraise(evidence, left_out)
        assert (found.status, found.checks) == (whole.status, whole.checks)
        assert whole.verified is not None
        assert found.verified == msgspec.structs.replace(whole.verified, state=None)


@given(st.lists(_ENTRY, max_size=12))
def test_what_is_in_force_was_in_force(new):
    """``seen`` holds whatever a log says is in force: findings look for it there."""
    state = state_of(*ENTRIES, *new)
    assert state.models.items() <= state.seen
    assert {("config", state.config), ("policy", state.policy)} <= state.seen
