"""Leave a controller while no agent runs: for a node whose agent does not start, because its TPM was cleared or its enrolment is damaged.

Rules:

1. Root alone may: it could remove the files as well. Files are touched as the user that owns the state directory, so that the agent can read them.
2. No agent runs meanwhile: its lock is taken. Nothing is made where there is nothing.
3. The TPM is asked before anything changes; then it is recorded, and only then done. What was interrupted is done by asking again.
4. Measurement logs are put aside where the TPM's resetCount fell below them, and kept; else they stay: an agent that starts again in this boot needs
   them. A log that is missing is no way around it: the PCR then tells another story, and nothing loads until a reboot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent import clock
from agent.attest.log import fell_from, retire_logs
from agent.attest.tpm_thread import TpmThread
from agent.audit.log import AuditLog
from agent.config import Settings
from agent.daemon.keylime import LOG_FOLDER
from agent.daemon.provision import audit_space, lock_state
from agent.errors import HostError, VerificationError
from agent.flows.controller import controller_origin
from agent.flows.enrolled import EnrolmentStore
from agent.records import AuditEvent

__all__ = ["Left", "leave_offline"]

MAX_ERROR_CHARS: Final = 1000
TPM_COMMANDS_TO_CONNECT: Final = 6


@dataclass(frozen=True, slots=True)
class Left:
    """What was given up.

    Attributes:
        enrolled: whether there was an enrolment; ``controller`` is where, empty where that could not be read any more.
        retired: folders whose measurement logs were put aside, because the TPM was cleared.
    """

    enrolled: bool
    controller: str
    retired: tuple[Path, ...]


def leave_offline(settings: Settings) -> Left:
    """Forget the enrolment, and put the logs of a cleared TPM aside.

    Raises:
        VerificationError: ``enrolment``: there is none, and the TPM was not cleared.
        HostError: not root, an agent runs, the TPM does not answer, or the disk does not do its part.
    """
    # 1. Root.
    if os.geteuid() != 0:
        raise HostError("only root can make a node leave while its agent does not run")
    state = Path(settings.node.state_dir)
    try:
        owner = state.stat()
    except OSError as error:
        raise HostError(f"state directory {state}: {error.strerror}") from error
    # 2. Nobody else.
    with _owner(owner):
        lock = lock_state(state)
    try:
        return asyncio.run(_leave(settings, state, owner))
    finally:
        os.close(lock)


@contextlib.contextmanager
def _owner(owner: os.stat_result) -> Iterator[None]:
    """Be the owner of the state directory."""
    group = os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


async def _leave(settings: Settings, state: Path, owner: os.stat_result) -> Left:
    store = EnrolmentStore(state / "controller")
    # 3. As root: the device may be for root and its group alone.
    reset_count = await _reset_count(settings)
    with _owner(owner):
        enrolled, controller, error = _known(store, settings.node.id)
        folders = (state / "measurements", state / LOG_FOLDER)
        cleared = tuple(folder for folder in folders if fell_from(folder, reset_count) is not None)
        if not enrolled and not cleared:
            raise VerificationError("enrolment", "this node is not enrolled, and its TPM was not cleared")
        await _record(settings, state, controller, error, len(cleared))
        store.forget()
        # 4.
        try:
            for folder in cleared:
                retire_logs(folder, clock.now_us())
        except OSError as failure:
            raise HostError(f"{failure.filename}: {failure.strerror}; ask again") from failure
    return Left(enrolled, controller, cleared)


async def _reset_count(settings: Settings) -> int:
    timeout_s = settings.tpm.timeout_ms / 1000
    tpm = TpmThread(settings.tpm.tcti, call_timeout_s=timeout_s, connect_timeout_s=TPM_COMMANDS_TO_CONNECT * timeout_s)
    try:
        return await tpm.call(lambda door: door.clock().reset_count)
    finally:
        await tpm.close()


def _known(store: EnrolmentStore, node: str) -> tuple[bool, str, str]:
    """Return whether the node is enrolled, where, and what is wrong with what it kept: that may be why it shall leave."""
    try:
        identity = store.load(node)
    except VerificationError as error:
        return True, "", str(error)
    return identity is not None, controller_origin(identity.enrolment.url)[0] if identity else "", ""


async def _record(settings: Settings, state: Path, controller: str, error: str, retired: int) -> None:
    audit = await AuditLog.open(
        state / "audit",
        settings.node.id,
        durability=settings.audit.durability,
        space=audit_space(settings.audit.max_bytes),
    )
    try:
        await audit.append(
            AuditEvent(
                kind="node.leave",
                time_us=clock.now_us(),
                outcome="ok",
                principal="uid:0",
                principal_kind="unix",
                action="leave",
                error=error[:MAX_ERROR_CHARS],
                detail={"controller": controller, "offline": True, "retired_logs": retired},
            )
        )
    finally:
        await audit.close()
