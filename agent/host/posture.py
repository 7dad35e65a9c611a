"""What the node says of its machine in Evidence and in the policy's input.

Rules:

1. Values are canonical (no floats), their unit stands in the name.
2. What can't be read is absent, never 0 or "".
3. Nothing here is a secret, and nothing here is proof: it is the agent's word, bound to the quote by the claims' digest.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from agent.clock import now
from agent.errors import HostError
from agent.records import JsonValue

__all__ = ["posture"]

MAX_PROCESSES = 256  # of our own tree; a fork bomb must not fill the claims
_SECURE_BOOT = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_LOCKDOWN = "kernel/security/lockdown"
_EFI_ATTRIBUTE_BYTES = 4  # efivarfs puts the variable's attributes before its value


def posture(state_directory: Path, *, sysfs: Path = Path("/sys")) -> dict[str, JsonValue]:
    """Return the facts of this moment; takes some milliseconds.

    Args:
        state_directory: whose disk is looked at.
        sysfs: where the kernel shows itself.

    Returns:
        ``kernel``, ``uptime_s``, ``cpus``, ``load1_milli``, ``memory_total_bytes``, ``memory_available_bytes``,
        ``state_disk_total_bytes``, ``state_disk_free_bytes``, ``processes`` (of our own tree: ``name``, ``pid``, ``pss_bytes``) and,
        where they can be read, ``secure_boot`` (bool) and ``lockdown`` (``none``, ``integrity``, ``confidentiality``).

    Raises:
        HostError: the state directory's disk can't be looked at.
    """
    memory = psutil.virtual_memory()
    try:
        disk = psutil.disk_usage(str(state_directory))
    except OSError as error:
        raise HostError(f"posture: can't look at the disk of {state_directory}: {error.strerror}") from error
    facts: dict[str, JsonValue] = {
        "kernel": os.uname().release,
        "uptime_s": max(0, int(now() - psutil.boot_time())),
        "cpus": os.cpu_count() or 1,
        "load1_milli": int(psutil.getloadavg()[0] * 1000),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "state_disk_total_bytes": disk.total,
        "state_disk_free_bytes": disk.free,
        "processes": _processes(),
    }
    secure_boot = _read(sysfs / _SECURE_BOOT)
    if secure_boot is not None and len(secure_boot) == _EFI_ATTRIBUTE_BYTES + 1:
        facts["secure_boot"] = secure_boot[-1] == 1
    lockdown = _read(sysfs / _LOCKDOWN)
    if lockdown is not None and b"[" in lockdown:
        facts["lockdown"] = lockdown.partition(b"[")[2].partition(b"]")[0].decode("ascii", "replace")
    return facts


def _processes() -> list[JsonValue]:
    found: list[JsonValue] = []
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)][:MAX_PROCESSES]:
        try:
            facts: dict[str, JsonValue] = {"name": process.name(), "pid": process.pid}
        except psutil.NoSuchProcess:
            continue
        pss = _pss_bytes(process.pid)
        if pss is not None:
            facts["pss_bytes"] = pss
        found.append(facts)
    return found


def _pss_bytes(pid: int) -> int | None:
    """Read the proportional set size; None for a process that ended or that even its parent may not look into."""
    rollup = _read(Path(f"/proc/{pid}/smaps_rollup"))
    for line in (rollup or b"").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # unknown is absent (rule 2)
