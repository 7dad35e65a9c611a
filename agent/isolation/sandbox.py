"""Confine this process for good, before it touches a byte that it must not trust.

Rules, in the order in which they are enforced:

1. One thread only: Landlock and the filter bind the thread that asks and those that it starts later.
2. Limits: address space = what is used now + a headroom; open files; no core dump.
3. Not dumpable, so no other process of this user reads its memory; no capability; no new privileges.
4. Memory that was writable never becomes executable (``PR_SET_MDWE``).
5. Landlock: no file at all, no TCP (one port when asked for), no signal and no abstract socket to the outside.
6. seccomp: a default-deny allowlist for the profile.

There is no way back. Where the kernel lacks Landlock or seccomp, ``required`` refuses; else the report names what is missing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import threading
from pathlib import Path

import msgspec

from agent.errors import IsolationError
from agent.isolation import bpf
from agent.isolation.kernel import MACHINE, prctl, syscall
from agent.isolation.landlock import ABI_NETWORK, ABI_SCOPES, restrict
from agent.isolation.landlock import abi as landlock_version
from agent.isolation.profiles import ENOSYS_CALLS, Profile, allowlist

__all__ = ["Limits", "Profile", "SandboxReport", "current_bytes", "enter", "probe", "set_limits", "thread_count"]

_PR_GET_SECCOMP = 21
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_MDWE, _PR_GET_MDWE = 65, 66
_MDWE_REFUSE_EXEC_GAIN = 1
_SECCOMP_SET_MODE_FILTER = 1
_CAPABILITY_VERSION_3 = 0x20080522
_SECCOMP_MACHINES = ("x86_64", "aarch64")

_entered: list[SandboxReport] = []  # of this process; a forked one inherits the sandbox and, with it, this fact


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child may use.

    Attributes:
        headroom_bytes: address space beyond what it has when it enters the sandbox. Each thread's stack (8 MiB) and
            allocator arena (64 MiB) count in full.
        open_files: highest number of descriptors.
    """

    headroom_bytes: int
    open_files: int


class SandboxReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds in a child, or what the kernel offers.

    Attributes:
        landlock_abi: 0 when Landlock is not in force.
        seccomp: the filter is in force.
        mdwe: memory never turns executable, by the kernel's own rule.
        missing: what is not in force, among ``landlock``, ``landlock-network``, ``landlock-scopes``, ``seccomp``, ``mdwe``.
    """

    landlock_abi: int
    seccomp: bool
    mdwe: bool
    missing: tuple[str, ...]


def probe() -> SandboxReport:
    """Say what this kernel offers, without entering."""
    return _report(
        landlock_version(),
        seccomp=MACHINE in _SECCOMP_MACHINES and _prctl_works(_PR_GET_SECCOMP),
        mdwe=_prctl_works(_PR_GET_MDWE),
    )


def enter(
    profile: Profile,
    limits: Limits,
    *,
    required: bool,
    landlock: bool = True,
    seccomp: bool = True,
    connect_port: int | None = None,
) -> SandboxReport:
    """Confine the calling process, which must have one thread.

    Args:
        profile: what it is for.
        limits: without effect when this process, or the one that forked it, is in a sandbox already: all but the filter
            is inherited then, and only a tighter filter is added.
        required: refuse when Landlock or seccomp cannot be had.
        landlock: False leaves this layer out, for tests of the other.
        seccomp: as ``landlock``.
        connect_port: a TCP port of this host that it may connect to.

    Raises:
        IsolationError: a thread runs, a layer that is required is missing, or the kernel refuses a step. The process
            may be half confined then: end it.
    """
    outer = _entered[-1] if _entered else None
    offered = outer or probe()
    abi = offered.landlock_abi if landlock else 0
    use_seccomp = offered.seccomp and seccomp
    if required and not (abi and use_seccomp):
        lacking = " and ".join(name for name, has in (("Landlock", abi), ("seccomp", use_seccomp)) if not has)
        raise IsolationError(f"sandbox: {lacking} is not available here, and the configuration requires it")
    # 1. one thread
    if (threads := thread_count(nested=outer is not None)) != 1:
        raise IsolationError(f"sandbox: {threads} threads run; the sandbox would bind only one of them")
    try:
        if outer is None:
            _confine(limits, abi, offered.mdwe, connect_port)
        # 6. seccomp
        if use_seccomp:
            _load_filter(profile, connect_port)
    except OSError as error:
        raise IsolationError(f"sandbox: the kernel refused a step: {error}") from error
    report = _report(abi, seccomp=use_seccomp, mdwe=offered.mdwe)
    _entered.append(report)
    return report


def _confine(limits: Limits, abi: int, has_mdwe: bool, connect_port: int | None) -> None:
    # 2. limits
    set_limits(limits)
    # 3. not dumpable, no capability, no new privileges
    prctl(_PR_SET_DUMPABLE, 0)
    _drop_capabilities()
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # 4. what was writable never turns executable
    if has_mdwe:
        prctl(_PR_SET_MDWE, _MDWE_REFUSE_EXEC_GAIN)
    # 5. Landlock
    if abi:
        restrict(abi, connect_port)


def set_limits(limits: Limits) -> None:
    """Bound the address space from what is used now, the open files, and leave no core dump.

    Raises:
        OSError: the kernel refuses.
    """
    size = current_bytes() + limits.headroom_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = size if hard == resource.RLIM_INFINITY else min(size, hard)
    _, hard_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = limits.open_files if hard_files == resource.RLIM_INFINITY else min(limits.open_files, hard_files)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def current_bytes() -> int:
    """Return the size of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def thread_count(*, nested: bool = False) -> int:
    """Return the number of threads, as the kernel counts them; ``nested``, where /proc is out of reach, as Python does."""
    return threading.active_count() if nested else len(list(Path("/proc/self/task").iterdir()))


def _drop_capabilities() -> None:
    header = ctypes.create_string_buffer(struct.pack("<Ii", _CAPABILITY_VERSION_3, 0), 8)
    nothing = ctypes.create_string_buffer(24)  # two struct __user_cap_data_struct: effective, permitted, inheritable
    syscall("capset", ctypes.addressof(header), ctypes.addressof(nothing))


def _load_filter(profile: Profile, connect_port: int | None) -> None:
    calls = allowlist(profile, os.getpid(), connect_port)
    code = bpf.encode(bpf.assemble(calls, MACHINE, missing=ENOSYS_CALLS))
    instructions = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: a count and, aligned to 8 bytes, a pointer
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions)), 16)
    syscall("seccomp", _SECCOMP_SET_MODE_FILTER, 0, ctypes.addressof(program))


def _prctl_works(option: int) -> bool:
    try:
        prctl(option)
    except OSError:
        return False
    return True


def _report(abi: int, *, seccomp: bool, mdwe: bool) -> SandboxReport:
    holds = {
        "landlock": abi > 0,
        "landlock-network": abi >= ABI_NETWORK,
        "landlock-scopes": abi >= ABI_SCOPES,
        "seccomp": seccomp,
        "mdwe": mdwe,
    }
    return SandboxReport(abi, seccomp, mdwe, tuple(name for name, has in holds.items() if not has))
