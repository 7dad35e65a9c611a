"""Findings: a true log held against the Reference Values."""

from dataclasses import dataclass

import msgspec
import pytest

from agent.attest.appraisal import appraise
from agent.attest.evidence import PcrValues, extra_data
from agent.attest.findings import MAX_CHECK_ENTRIES
from agent.attest.measurement import Entry, config_entry, model_entry, policy_entry, refused_entry, replay, unload_entry
from agent.attest.reference import BootRule, Measurement, PolicyReference, ReferenceValues
from agent.errors import VerificationError
from tests.support.attest import (
    BOOT_PCRS,
    CONFIG,
    ENTRIES,
    MODEL,
    NONCE,
    POLICY,
    Attester,
    digest,
    expectation,
    with_reference,
)

HONEST = Attester()
ASKED = expectation()

BAD = digest("bad")
PINNED = with_reference(boot={0: BootRule("pinned", frozenset({"00" * 32})), 7: BootRule("ignored")})
EXACT = with_reference(boot={0: BootRule("exact", frozenset({"00" * 32}))})
APPROVED_BOOT = with_reference(boot={0: BootRule("exact", frozenset({BOOT_PCRS[0].hex()}))})
WITHDRAWN = with_reference(models={}, withdrawn={"m/1/model.onnx": frozenset({MODEL.hex()})})
ROLLOUT = with_reference(policy=PolicyReference(assigned=BAD.hex(), previous=POLICY.hex()))
RETIRED_CONFIG = with_reference(configs=frozenset({BAD.hex()}), retired_configs=frozenset({CONFIG.hex()}))
RETIRED = with_reference(policy=PolicyReference(assigned=BAD.hex(), retired=frozenset({POLICY.hex()})))


@dataclass(frozen=True)
class State:
    """A true log, what is approved, and what must be said about it."""

    words: str
    entries: tuple[Entry, ...]
    status: str
    check: str = ""
    reference: ReferenceValues = ASKED.reference
    claims: tuple[tuple[str, str], ...] = ()


STATES = [
    State("an unapproved model is in force", (model_entry("m", "2", "f", BAD),), "contraindicated", "models"),
    State(
        "another digest at an approved path", (model_entry("m", "1", "model.onnx", BAD),), "contraindicated", "models"
    ),
    State(
        "an unapproved model was unloaded",
        (model_entry("m", "2", "f", BAD), unload_entry("m", "2")),
        "contraindicated",
        "models",
    ),
    State(
        "an unapproved model was repaired",
        (model_entry("m", "1", "model.onnx", BAD), model_entry("m", "1", "model.onnx", MODEL)),
        "contraindicated",
        "models",
    ),
    State("a withdrawn model is in force", (), "contraindicated", "models", WITHDRAWN),
    State("a withdrawn model was unloaded", (unload_entry("m", "1"),), "affirming", "", WITHDRAWN),
    State("a file was refused", (refused_entry("m", "2", "f", BAD),), "warning", "refused"),
    State(
        "many files were refused",
        tuple(refused_entry("m", "2", f"f{at}", BAD) for at in range(9)),
        "warning",
        "refused",
    ),
    State(
        "a refused file was repaired",
        (refused_entry("m", "1", "model.onnx", BAD), model_entry("m", "1", "model.onnx", MODEL)),
        "affirming",
    ),
    State("unapproved settings", (config_entry(BAD),), "contraindicated", "config"),
    State("unapproved settings for a time", (config_entry(BAD), config_entry(CONFIG)), "contraindicated", "config"),
    State("retired settings in force", (), "contraindicated", "config", RETIRED_CONFIG),
    State("retired settings earlier", (config_entry(BAD),), "affirming", "", RETIRED_CONFIG),
    State(
        "an unapproved policy",
        (policy_entry("r2", BAD),),
        "contraindicated",
        "policy",
        claims=(("policy_sha256", BAD.hex()),),
    ),
    State(
        "an unapproved policy for a time",
        (policy_entry("r2", BAD), policy_entry("r1", POLICY)),
        "contraindicated",
        "policy",
    ),
    State("the policy before a rollout", (), "affirming", "", ROLLOUT),
    State(
        "the policy of a rollout",
        (policy_entry("r2", BAD),),
        "affirming",
        "",
        ROLLOUT,
        claims=(("policy_sha256", BAD.hex()),),
    ),
    State("a retired policy in force", (), "contraindicated", "policy", RETIRED),
    State(
        "a retired policy earlier",
        (policy_entry("r2", BAD),),
        "affirming",
        "",
        RETIRED,
        claims=(("policy_sha256", BAD.hex()),),
    ),
    State("the claims name another policy", (), "contraindicated", "policy", claims=(("policy_sha256", BAD.hex()),)),
    State("a pinned boot PCR changed", (), "warning", "boot-pcrs", PINNED),
    State("an exact boot PCR is wrong", (), "contraindicated", "boot-pcrs", EXACT),
    State("an exact boot PCR is right", (), "affirming", "", APPROVED_BOOT),
]  # fmt: skip -- a table


@pytest.mark.parametrize("case", STATES, ids=[case.words for case in STATES])
def test_a_true_state_is_held_against_the_reference_values(case):
    """True Evidence is affirming, a warning or contraindicated, by the first finding, and can always be continued."""
    evidence = HONEST.evidence((*ENTRIES, *case.entries), **dict(case.claims))
    result = appraise(evidence.encode(), expectation(reference=case.reference))
    assert result.status == case.status
    findings = [check.name for check in result.checks if check.outcome not in {"ok", "skipped"}]
    assert findings == ([case.check] if case.check else [])
    assert result.verified is not None


def test_a_node_that_measured_nothing_is_not_in_order():
    """A log of the boot alone has neither settings nor a policy in force."""
    result = appraise(HONEST.evidence(ENTRIES[:1], policy_sha256=msgspec.UNSET).encode(), ASKED)
    assert [check.name for check in result.checks if check.outcome == "failed"] == ["config", "policy"]


def test_a_boot_pcr_that_moved_since_the_log_began_is_a_warning():
    """boot_aggregate is held against the quoted PCRs."""
    result = appraise(HONEST.evidence(pcrs={3: BAD}).encode(), ASKED)
    assert result.status == "warning"
    assert [check.name for check in result.checks if check.outcome == "warning"] == ["boot-aggregate"]


def test_a_log_in_a_boot_pcr_does_not_disturb_its_own_boot_aggregate():
    """Where PCR 8 or 9 holds the log, boot_aggregate is over its start value."""
    start = BOOT_PCRS[9]
    attester = Attester(selected=(*range(10), 11))
    evidence = attester.evidence()
    values = BOOT_PCRS | {9: replay(ENTRIES, start)}
    attest, signature = attester.quote(extra_data(NONCE, evidence.claims), values)
    sent = msgspec.structs.replace(
        evidence,
        attest=attest,
        signature=signature,
        entries=b"".join(entry.encode(9) for entry in ENTRIES),
        pcrs=PcrValues({index: value.hex() for index, value in values.items()}),
    )
    reference = with_reference(measurement=Measurement(9, start.hex()))
    assert appraise(sent.encode(), expectation(reference=reference)).status == "affirming"


def test_the_first_finding_is_named():
    """Of several findings each is shown, and the first is the failed one."""
    bad = (model_entry("m", "2", "f", BAD), config_entry(BAD))
    result = appraise(HONEST.evidence((*ENTRIES, *bad)).encode(), ASKED)
    assert [check.name for check in result.checks if check.outcome == "failed"] == ["models", "config"]
    with pytest.raises(VerificationError) as raised:
        result.require()
    assert raised.value.check == "models"


ABOUT = [
    ((model_entry("m", "2", "f", BAD),), "models", ("edgewarden/models/m/2/f",)),
    ((model_entry("m", "2", "f", BAD), unload_entry("m", "2")), "models", ("edgewarden/models/m/2/f",)),
    ((refused_entry("m", "2", "f", BAD),), "refused", ("edgewarden/refused/m/2/f",)),
    ((config_entry(BAD),), "config", ("edgewarden/config",)),
    ((policy_entry("r2", BAD),), "policy", ("edgewarden/policy/r2",)),
    ((policy_entry("r2", BAD), policy_entry("r1", POLICY)), "policy", ()),
]


@pytest.mark.parametrize(("entries", "check", "paths"), ABOUT, ids=[str(row[2]) for row in ABOUT])
def test_a_finding_names_the_entries_that_it_is_about(entries, check, paths):
    """An operator, or a program, sees which paths of the log to look at; an earlier policy's path is not kept."""
    last = next((entry for entry in reversed(entries) if entry.path.startswith("edgewarden/policy/")), ENTRIES[2])
    evidence = HONEST.evidence((*ENTRIES, *entries), policy_sha256=last.digest.hex())
    result = appraise(evidence.encode(), ASKED)
    assert {found.name: found.entries for found in result.checks if found.outcome in {"failed", "warning"}} == {
        check: paths
    }


def test_the_entries_of_a_finding_are_bounded():
    """A node that refuses files without end makes no check without end."""
    refused = tuple(refused_entry("m", "2", f"f{at:02}", BAD) for at in range(MAX_CHECK_ENTRIES + 1))
    result = appraise(HONEST.evidence((*ENTRIES, *refused)).encode(), ASKED)
    (found,) = (check for check in result.checks if check.outcome == "warning")
    assert found.entries == tuple(entry.path for entry in refused[:MAX_CHECK_ENTRIES])


def test_a_node_whose_boot_is_as_it_was_enrolled_is_affirming():
    """The boot PCRs of the enrolment pass, each change from there on warns, and so does a PCR that was not enrolled."""
    group = with_reference(boot={index: BootRule("pinned") for index in (0, 7)})
    enrolled = {index: value.hex() for index, value in BOOT_PCRS.items()}
    evidence = HONEST.evidence().encode()
    held: list[dict[int, str]] = [enrolled, enrolled | {7: "00" * 32}, {0: enrolled[0]}, {}]
    found = [appraise(evidence, expectation(reference=group, enrolled_pcrs=pcrs)).status for pcrs in held]
    assert found == ["affirming", "warning", "warning", "warning"]


def test_a_value_approved_since_the_enrolment_stands_beside_it():
    """A pinned PCR takes the enrolment's value and those that were approved since."""
    now = BOOT_PCRS[0].hex()
    approved = with_reference(boot={0: BootRule("pinned", frozenset({now}))})
    assert appraise(
        HONEST.evidence().encode(), expectation(reference=approved, enrolled_pcrs={0: "00" * 32})
    ).status == ("affirming")


def test_a_value_of_the_enrolment_is_no_exact_value():
    """What a node brought when it was enrolled is taken for pinned PCRs alone."""
    exact = with_reference(boot={0: BootRule("exact", frozenset({"00" * 32}))})
    found = appraise(HONEST.evidence().encode(), expectation(reference=exact, enrolled_pcrs={0: BOOT_PCRS[0].hex()}))
    assert found.failed is not None
    assert (found.status, found.failed.name) == ("contraindicated", "boot-pcrs")
