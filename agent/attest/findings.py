"""What a replayed log says, held against the Reference Values: the checks 13-18 of an appraisal, pure.

Rules:

1. What is in force must be approved now: ``models``, ``configs``, ``policy.assigned`` or ``policy.previous``.
2. What was in force earlier in this boot must have been approved once: one of those, or ``withdrawn``, ``retired_configs``,
   ``policy.retired``. So a new version never raises a false alarm, and a withdrawn one is no alarm once it is out of force.
3. What was never approved stays a finding until the next reset: no later entry takes it back.
4. A refused file is a warning until its path is handed over again.
5. All findings are given, not only the first: an operator wants to see every reason at once.
6. What follows from the log and the Reference Values alone (13-16) is a :class:`Judgement`. It holds for as long as both are the same, which is
   most of the time: then a Verifier that has kept it compares nothing anew, and needs no state of a log that has not grown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from agent.attest.evidence import Claims, HexDigest
from agent.attest.log_state import LogState
from agent.attest.measurement import (
    BOOT_AGGREGATE,
    CONFIG_PATH,
    boot_aggregate,
    model_path,
    policy_path,
    refused_path,
)
from agent.attest.reference import ReferenceValues

__all__ = ["MAX_CHECK_ENTRIES", "Check", "Judgement", "Outcome", "compare", "judge"]

MAX_CHECK_ENTRIES = 16
_MAX_WORDS = 5

Outcome: TypeAlias = Literal["ok", "failed", "warning", "retry", "skipped"]


_Seen: TypeAlias = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Check:
    """One check's outcome, with words for a reader.

    Attributes:
        entries: paths of the log that a failed check or a warning is about, sorted, at most :data:`MAX_CHECK_ENTRIES`.
            Of a policy that was in force earlier the log's state keeps the digest alone, which stands in the words.
    """

    name: str
    outcome: Outcome
    words: str = ""
    entries: tuple[str, ...] = ()


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a log says, held against Reference Values.

    Attributes:
        reference: their digest.
        policy, policy_revision: in force, as the log says.
        boot_aggregate: what the log began with.
        checks: 13-16.
    """

    reference: HexDigest
    policy: HexDigest | None
    policy_revision: str | None
    boot_aggregate: HexDigest | None
    checks: tuple[Check, ...]


def judge(state: LogState, reference: ReferenceValues) -> Judgement:
    """Hold the state of a whole, verified log against what the operator approved."""
    # What was ever in force and is not approved now: few, so that each check looks at these alone.
    approved = reference.models.get
    odd = [(what, digest) for what, digest in state.seen if "/" not in what or digest not in approved(what, ())]
    checks = (
        # 13. Every model file that was ever handed over since the reset was approved; those in force still are.
        _models(state, odd, reference),
        # 14. Nothing that was refused waits for its repair.
        _refused(state),
        # 15. Settings, now and earlier.
        _config(state, odd, reference),
        # 16. The policy in force is assigned, or was until this rollout; earlier ones were approved once.
        _policy(state, odd, reference),
    )
    return Judgement(reference.digest, state.policy, state.policy_revision, state.boot_aggregate, checks)


def compare(
    judgement: Judgement,
    claims: Claims,
    values: Mapping[int, bytes],
    reference: ReferenceValues,
    enrolled: Mapping[int, str],
) -> tuple[Check, ...]:
    """Return the checks 13-18.

    Args:
        judgement: of the whole log, verified.
        claims: authentic.
        values: quoted PCRs by index.
        reference: what the operator approved.
        enrolled: boot PCRs at enrolment by index, lower-case hex: what ``pinned`` rules take besides their own values.
    """
    return (
        *_unless_claimed_otherwise(judgement, claims),
        # 17. The log began on the boot that the TPM shows.
        _boot_aggregate(judgement, values, reference),
        # 18. Boot PCRs by their rules.
        _boot_pcrs(values, reference, enrolled),
    )


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:_MAX_WORDS]) + (f" and {len(found) - _MAX_WORDS} more" if len(found) > _MAX_WORDS else "")


def _bounded(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(paths)[:MAX_CHECK_ENTRIES])


def _models(state: LogState, odd: _Seen, reference: ReferenceValues) -> Check:
    # What is in force was in force: `seen` holds it too, so that who is not odd need not be looked at again.
    in_force = {path for path, digest in odd if state.models.get(path) == digest}
    if in_force:
        words = f"in force and not approved: {_some(in_force)}"
        return Check("models", "failed", words, _bounded(map(model_path, in_force)))
    ever = {path for path, digest in odd if "/" in path and digest not in reference.withdrawn.get(path, ())}
    if ever:
        words = f"handed over since the last reset and never approved: {_some(ever)}"
        return Check("models", "failed", words, _bounded(map(model_path, ever)))
    return Check("models", "ok")


def _refused(state: LogState) -> Check:
    if not state.refused:
        return Check("refused", "ok")
    return Check("refused", "warning", f"refused: {_some(state.refused)}", _bounded(map(refused_path, state.refused)))


def _config(state: LogState, odd: _Seen, reference: ReferenceValues) -> Check:
    once = reference.configs | reference.retired_configs
    words = _setting("config", odd, state.config, reference.configs, once)
    return Check("config", "failed", words, (CONFIG_PATH,)) if words else Check("config", "ok")


def _policy(state: LogState, odd: _Seen, reference: ReferenceValues) -> Check:
    policy = reference.policy
    words = _setting("policy", odd, state.policy, policy.in_force, policy.in_force | policy.retired)
    if words:
        entries = _policy_entries(state.policy_revision) if state.policy not in policy.in_force else ()
        return Check("policy", "failed", words, entries)
    if state.policy != policy.assigned:
        return Check("policy", "ok", "the previous policy: the assigned one has not arrived yet")
    return Check("policy", "ok")


def _policy_entries(revision: str | None) -> tuple[str, ...]:
    return () if revision is None else (policy_path(revision),)


def _unless_claimed_otherwise(judgement: Judgement, claims: Claims) -> tuple[Check, ...]:
    """Return the checks 13-16: who claims another policy than the one that was measured fails for that."""
    if judgement.policy is None or claims.policy_sha256 == judgement.policy:
        return judgement.checks
    entries = _policy_entries(judgement.policy_revision)
    other = Check("policy", "failed", "the claims name another policy than the log", entries)
    return tuple(other if check.name == "policy" else check for check in judgement.checks)


def _setting(kind: str, odd: _Seen, in_force: str | None, approved: frozenset[str], once: frozenset[str]) -> str:
    """Return what is wrong with settings or policy; empty when nothing is."""
    if in_force is None:
        return f"no {kind} was measured"
    if in_force not in approved:
        return f"the {kind} in force ({in_force[:16]}…) is not approved"
    unknown = {digest for what, digest in odd if what == kind} - once
    if unknown:
        return f"a {kind} was in force since the last reset that was never approved: {_some(unknown)}"
    return ""


def _boot_aggregate(judgement: Judgement, values: Mapping[int, bytes], reference: ReferenceValues) -> Check:
    at_start = {**values, reference.measurement.pcr: bytes.fromhex(reference.measurement.start)}
    expected = boot_aggregate(at_start[index] for index in range(10)).digest.hex()
    if judgement.boot_aggregate == expected:
        return Check("boot-aggregate", "ok")
    return Check("boot-aggregate", "warning", "PCRs 0-9 are not what they were when the log began", (BOOT_AGGREGATE,))


def _boot_pcrs(values: Mapping[int, bytes], reference: ReferenceValues, enrolled: Mapping[int, str]) -> Check:
    changed: dict[str, list[str]] = {"ignored": [], "pinned": [], "exact": []}
    for index, rule in sorted(reference.boot.items()):
        value = values[index].hex()
        if value not in rule.values and not (rule.mode == "pinned" and enrolled.get(index) == value):
            changed[rule.mode].append(str(index))
    if changed["exact"]:
        return Check("boot-pcrs", "failed", f"PCRs {', '.join(changed['exact'])} are not what was approved")
    if changed["pinned"]:
        words = f"PCRs {', '.join(changed['pinned'])} changed since enrolment; approve the change or look into it"
        return Check("boot-pcrs", "warning", words)
    return Check("boot-pcrs", "ok")
