"""Approvals become Reference Values: each makes the next version of its group's.

Rules:

1. What is approved is read here, from the bytes: a model package's signature and every digest, a policy bundle's signature and digest. An operator
   approves things, not numbers.
2. A model version that is withdrawn stays known as withdrawn: fine in the past, not in force, and not to be loaded.
3. The assigned policy becomes the previous one when another is approved; the one before is retired.
4. An approval adds. Values of a boot PCR stand beside those of the same rule; a rule of another kind takes the place of the one before, with its
   values. An ``exact`` rule has a value: one that no node can meet is a mistake.
5. Nodes of the group are appraised again soon: a withdrawal must not wait for an interval.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import msgspec

from agent import clock
from agent.attest.evidence import HexDigest
from agent.attest.measurement import ALLOWED_PCRS, ZERO_PCR
from agent.attest.reference import BootRule, Measurement, PolicyReference, ReferenceValues
from agent.attest.result import MAX_WITHDRAWN
from agent.errors import PeerError
from controller.store import audit, references, schedule
from controller.store.database import Database

__all__ = ["Approval", "Change", "Withdrawal", "approve", "withdraw"]

_Path = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,400}\Z")]
MAX_FILES = 256  # of one model package
MAX_BOOT_VALUES = 256  # approved for one boot PCR
_BOOT_VALUE = re.compile(r"([0-9]{1,2})=([0-9a-f]{64})")


class Approval(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an approver approves, read from the signed things by the command line that sends it.

    Attributes:
        models: digests by ``name/version/file``.
        policy: digest of a bundle, which becomes the assigned one.
        config: digest of the measured settings.
        boot: rules for boot PCRs.
        pcr, start: of the measurement log; they can be set while a group has no version.
    """

    models: Annotated[dict[_Path, HexDigest], msgspec.Meta(max_length=MAX_FILES * 16)] = {}
    policy: HexDigest | None = None
    config: HexDigest | None = None
    boot: dict[int, BootRule] = {}
    pcr: int | None = None
    start: HexDigest | None = None
    words: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Withdrawal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is approved no more: a model version (``name/version``), a policy or a configuration by digest, a boot PCR's value (``7=<digest>``)."""

    kind: Literal["model", "policy", "config", "boot"]
    what: Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
    words: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Change(msgspec.Struct, frozen=True):
    """A new version."""

    group: str
    version: int
    change: str


_Edit: TypeAlias = Callable[[ReferenceValues | None], tuple[ReferenceValues, str]]


@dataclass(frozen=True, slots=True)
class _Request:
    kind: str
    words: str
    by: str
    new_interval_s: int | None = None  # of a group that is made with it; None: there must be one


async def approve(database: Database, group: str, approval: Approval, by: str, interval_s: int) -> Change:
    """Approve; makes the group where there is none.

    Raises:
        PeerError: 422, for a first approval that leaves something open, or a PCR that can't be changed.
    """
    request = _Request("reference.approve", approval.words, by, new_interval_s=interval_s)
    return await _change(database, group, lambda values: _approved(values, approval), request)


async def withdraw(database: Database, group: str, withdrawal: Withdrawal, by: str) -> Change:
    """Withdraw.

    Raises:
        PeerError: 404, when that was not approved.
    """
    request = _Request("reference.withdraw", withdrawal.words, by)
    return await _change(database, group, lambda values: _withdrawn(values, withdrawal), request)


async def _change(database: Database, group: str, edit: _Edit, request: _Request) -> Change:
    now_us = clock.now_us()
    async with database.begin() as connection:
        if request.new_interval_s is not None:
            await references.add_group(connection, group, request.new_interval_s)
        version, values = await references.current(connection, group)
        changed, what = edit(values)
        change = f"{what}: {request.words}" if request.words else what
        number = await references.put(connection, group, version, changed, change=change, by=request.by, now_us=now_us)
        entry = audit.AuditEntry(
            kind=request.kind, principal=request.by, words=change, detail={"group": group, "version": number}
        )
        # The audit log's head is locked last, here as wherever a node's row of the schedule is: in another order two wait for each other.
        await schedule.hurry(connection, group, now_us)
        await audit.append(connection, entry)
    return Change(group, number, change)


def _approved(values: ReferenceValues | None, approval: Approval) -> tuple[ReferenceValues, str]:
    if values is None:
        values = _first(approval)
    elif approval.pcr not in {None, values.measurement.pcr} or approval.start not in {None, values.measurement.start}:
        raise PeerError(
            422, "measurement", "a group's measurement PCR can't change: nodes measure into it; make another group"
        )
    models = dict(values.models)
    withdrawn = dict(values.withdrawn)
    for path, digest in approval.models.items():
        models[path] = models.get(path, frozenset()) | {digest}
        withdrawn[path] = withdrawn.get(path, frozenset()) - {digest}
    done = sorted({path.rpartition("/")[0] for path in approval.models})
    policy = values.policy
    if approval.policy is not None and approval.policy != policy.assigned:
        retired = policy.retired | ({policy.previous} if policy.previous else set())
        policy = PolicyReference(approval.policy, policy.assigned, frozenset(retired) - {approval.policy})
        done.append(f"policy {approval.policy[:16]}")
    configs = values.configs | ({approval.config} if approval.config else set())
    if approval.config:
        done.append(f"config {approval.config[:16]}")
    done += [f"boot PCR {index} {rule.mode}" for index, rule in sorted(approval.boot.items())]
    changed = msgspec.structs.replace(
        values,
        models=models,
        withdrawn={path: digests for path, digests in withdrawn.items() if digests},
        policy=policy,
        configs=frozenset(configs),
        boot=values.boot | {index: _added(values.boot.get(index), rule) for index, rule in approval.boot.items()},
    )
    return _checked(changed), "approved " + (", ".join(done) or "nothing new")


def _added(before: BootRule | None, rule: BootRule) -> BootRule:
    if before is None or before.mode != rule.mode:
        return rule
    return BootRule(rule.mode, before.values | rule.values)


def _first(approval: Approval) -> ReferenceValues:
    if approval.policy is None or approval.config is None or approval.pcr is None:
        raise PeerError(
            422, "first_approval", "a group's first approval names policy, configuration and measurement PCR"
        )
    return ReferenceValues(
        measurement=Measurement(approval.pcr, approval.start or ZERO_PCR.hex()),
        policy=PolicyReference(approval.policy),
        configs=frozenset({approval.config}),
    )


def _checked(values: ReferenceValues) -> ReferenceValues:
    if values.measurement.pcr not in ALLOWED_PCRS:
        raise PeerError(422, "measurement", f"the log can only be held in one of PCRs {sorted(ALLOWED_PCRS)}")
    if values.boot.keys() - {*range(10), 11} or values.measurement.pcr in values.boot:
        raise PeerError(422, "boot", "boot rules are for PCRs 0-9 and 11, without the measurement PCR")
    for index, rule in values.boot.items():
        if rule.mode == "exact" and not rule.values:
            raise PeerError(422, "boot", f"PCR {index} would have no value that is approved: no node could be trusted")
        if len(rule.values) > (0 if rule.mode == "ignored" else MAX_BOOT_VALUES):
            raise PeerError(422, "boot", f"PCR {index}: at most {MAX_BOOT_VALUES} values, and none where it is ignored")
    return values


def _tellable(values: ReferenceValues) -> ReferenceValues:
    """Return them unless more is withdrawn than a node reads."""
    if len(values.withdrawn_digests) > MAX_WITHDRAWN:
        words = (
            f"a result names at most {MAX_WITHDRAWN} withdrawn files: take the signer out of the nodes' trust instead"
        )
        raise PeerError(422, "too_many", words)
    return values


def _withdrawn(values: ReferenceValues | None, withdrawal: Withdrawal) -> tuple[ReferenceValues, str]:
    missing = PeerError(404, "not_approved", f"{withdrawal.kind} {withdrawal.what} is not approved")
    if values is None:
        raise missing
    replace = msgspec.structs.replace
    changed: ReferenceValues
    match withdrawal.kind:
        case "model":
            gone = {path: values.models[path] for path in values.models if path.startswith(withdrawal.what + "/")}
            if not gone:
                raise missing
            models = {path: digests for path, digests in values.models.items() if path not in gone}
            withdrawn = values.withdrawn | {
                path: values.withdrawn.get(path, frozenset()) | digests for path, digests in gone.items()
            }
            changed = _tellable(replace(values, models=models, withdrawn=withdrawn))
        case "config":
            if withdrawal.what not in values.configs:
                raise missing
            changed = replace(
                values,
                configs=values.configs - {withdrawal.what},
                retired_configs=values.retired_configs | {withdrawal.what},
            )
        case "policy":
            if withdrawal.what == values.policy.assigned:
                raise PeerError(422, "assigned", "this policy is the assigned one: approve another first")
            if withdrawal.what != values.policy.previous:
                raise missing
            retired = values.policy.retired | {withdrawal.what}
            changed = replace(values, policy=PolicyReference(values.policy.assigned, None, retired))
        case "boot":
            changed = _checked(replace(values, boot=values.boot | _boot_without(values, withdrawal.what, missing)))
    return changed, f"withdrew {withdrawal.kind} {withdrawal.what}"


def _boot_without(values: ReferenceValues, what: str, missing: PeerError) -> dict[int, BootRule]:
    named = _BOOT_VALUE.fullmatch(what)
    index, value = (int(named[1]), named[2]) if named else (-1, "")
    rule = values.boot.get(index)
    if rule is None or value not in rule.values:
        raise missing
    return {index: BootRule(rule.mode, rule.values - {value})}
