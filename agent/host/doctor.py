"""Checks a host and says in plain words what is missing and how to mend it.

Rules:

1. A check never raises for what it finds: what can't be found out is a warning that says so.
2. ``fail`` is what stops the agent or breaks a promise that it makes; ``warn`` is what an operator should know.
3. What other rooms know (sandbox, TPM) comes in as values or as a function; this room imports none of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from agent.errors import HostError

__all__ = ["Finding", "Level", "PcrReader", "Sandbox", "Setup", "examine"]

Level = Literal["ok", "warn", "fail"]
PcrReader: TypeAlias = Callable[[], Mapping[str, Mapping[int, str]]]
"""Reads every allocated bank: bank name to PCR index to hex digest. Raises HostError (as TpmError is)."""

MIN_KERNEL = (5, 13)  # Landlock
MIN_SYSTEMD = 250  # LoadCredentialEncrypted=, and every directive of the shipped unit
MIN_OPEN_FILES = 4096
MEASUREMENT_PCRS = (8, 9, 11, 12, 13, 14, 15)  # 16 and 23 can be reset at locality 0
COMMAND_TIMEOUT_S = 10.0
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES = 512  # more than struct timex has on any architecture; zeros mean: change nothing


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What this kernel can confine a process with, as the isolation room's probe reports it."""

    landlock_abi: int
    seccomp: bool
    mdwe: bool


@dataclass(frozen=True, slots=True)
class Setup:
    """What the checks are about.

    Attributes:
        state_directory: where the agent keeps its state; made by systemd or the operator.
        private_files: keys and tokens, and directories that hold them.
        needed_bytes: free space that the audit log and the model store want.
        tcti: the TPM's connection string, for example ``device:/dev/tpmrm0``; None when there is none.
        measurement_pcr: the PCR that models are measured into.
        engine: the policy engine.
        opa: the OPA binary, by name or path.
        sandbox: None when it was not probed.
        read_pcrs: None when the TPM is not to be asked.
    """

    state_directory: Path
    private_files: tuple[Path, ...] = ()
    needed_bytes: int = 2 * 1024**3
    tcti: str | None = None
    measurement_pcr: int = 14
    engine: Literal["embedded", "opa"] = "embedded"
    opa: str = "opa"
    sandbox: Sandbox | None = None
    read_pcrs: PcrReader | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found and, unless it is ok, how to mend it."""

    check: str
    level: Level
    found: str
    fix: str = ""


def examine(setup: Setup) -> tuple[Finding, ...]:
    """Run all checks, in the order in which an operator would mend them."""
    return (
        check_kernel(os.uname().release),
        *check_sandbox(setup.sandbox),
        check_tpm_device(setup.tcti),
        *check_pcrs(setup.read_pcrs, setup.measurement_pcr),
        check_entropy(),
        check_clock(),
        *check_directory(setup.state_directory, setup.needed_bytes),
        *(finding for path in setup.private_files for finding in check_private(path)),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        *check_engine(setup.engine, setup.opa),
        check_user(os.geteuid()),
        check_systemd(_output("systemctl", "--version")),
    )


def check_kernel(release: str) -> Finding:
    """Check the kernel's version."""
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        return Finding("kernel", "warn", f"release {release!r} has no version", "use a Linux kernel 5.13 or newer")
    if (int(found[1]), int(found[2])) < MIN_KERNEL:
        return Finding("kernel", "fail", f"{release} has no Landlock", "use a Linux kernel 5.13 or newer")
    return Finding("kernel", "ok", release)


def check_sandbox(sandbox: Sandbox | None) -> Iterator[Finding]:
    """Check what a child process can be confined with."""
    if sandbox is None:
        yield Finding("sandbox", "warn", "was not probed", "run 'edgewarden doctor' on the node itself")
        return
    if sandbox.landlock_abi < 1:
        fix = "build the kernel with CONFIG_SECURITY_LANDLOCK and add landlock to the lsm= kernel parameter"
        yield Finding("landlock", "fail", "is not available", fix)
    else:
        yield Finding("landlock", "ok", f"ABI {sandbox.landlock_abi}")
    if sandbox.seccomp:
        yield Finding("seccomp", "ok", "filters are available")
    else:
        yield Finding("seccomp", "fail", "filters are not available", "build the kernel with CONFIG_SECCOMP_FILTER")
    if sandbox.mdwe:
        yield Finding("mdwe", "ok", "memory can be kept from becoming executable")
    else:
        fix = "use a Linux kernel 6.3 or newer; until then the seccomp filter refuses executable memory"
        yield Finding("mdwe", "warn", "PR_SET_MDWE is not available", fix)


def check_tpm_device(tcti: str | None) -> Finding:
    """Check that the TPM's device is there and that this user may use it."""
    if not tcti:
        return Finding("tpm device", "fail", "no TPM is configured", "set tpm.tcti, for example to device:/dev/tpmrm0")
    kind, _, argument = tcti.partition(":")
    if kind != "device":
        return Finding(
            "tpm device",
            "warn",
            f"{kind} is no hardware TPM: it proves nothing",
            "use device:/dev/tpmrm0 in production",
        )
    return _device(Path(argument or "/dev/tpmrm0"))


def _device(path: Path) -> Finding:
    if not path.exists():
        fix = "switch the TPM 2.0 on in the firmware (fTPM, PTT) and load the driver tpm_tis or tpm_crb"
        return Finding("tpm device", "fail", f"{path} does not exist", fix)
    if not path.is_char_device():
        return Finding("tpm device", "fail", f"{path} is no device", "set tpm.tcti to device:/dev/tpmrm0")
    if not os.access(path, os.R_OK | os.W_OK):
        fix = "add the service's user to the group tss (the shipped unit does) and check the udev rule of tpm2-tss"
        return Finding("tpm device", "fail", f"{path} can't be read and written by this user", fix)
    if path.name == "tpm0":
        return Finding(
            "tpm device", "warn", "/dev/tpm0 serves one process at a time", "use /dev/tpmrm0, the resource manager"
        )
    return Finding("tpm device", "ok", f"{path} can be used")


def check_pcrs(read_pcrs: PcrReader | None, measurement_pcr: int) -> Iterator[Finding]:
    """Check the allocated banks, and that the measurement PCR is one that nobody else has extended."""
    if read_pcrs is None:
        yield Finding("pcr banks", "warn", "the TPM was not asked", "run again with the TPM configured")
        return
    try:
        banks = read_pcrs()
    except HostError as error:
        yield Finding("pcr banks", "fail", f"the TPM does not answer: {error}", "mend the TPM device first")
        return
    names = ", ".join(sorted(banks)) or "none"
    if "sha256" not in banks:
        fix = "allocate it (tpm2_pcrallocate sha256:all) and restart the machine"
        yield Finding("pcr banks", "fail", f"no SHA-256 bank is allocated (found: {names})", fix)
        return
    if "sha1" in banks:
        fix = "where nothing needs SHA-1, free it (tpm2_pcrallocate sha1:none+sha256:all) and restart the machine"
        yield Finding("pcr banks", "warn", f"{names}: SHA-1 is extended too", fix)
    else:
        yield Finding("pcr banks", "ok", names)
    yield _measurement_pcr(banks["sha256"], measurement_pcr)


def _measurement_pcr(bank: Mapping[int, str], chosen: int) -> Finding:
    check = "measurement pcr"
    free = [index for index in MEASUREMENT_PCRS if set(bank.get(index, "x")) == {"0"}]
    proposal = (
        f"set tpm.pcr to one that is zero: {', '.join(map(str, free))}"
        if free
        else "restart the machine and check again"
    )
    if chosen not in MEASUREMENT_PCRS:
        return Finding(check, "fail", f"PCR {chosen} can't hold measurements", proposal)
    if chosen in free:
        return Finding(check, "ok", f"PCR {chosen} is zero")
    found = f"PCR {chosen} is not zero: the agent has run since the machine started, or something else uses it"
    return Finding(check, "warn", found, f"if the agent has not run yet, {proposal}")


def check_entropy() -> Finding:
    """Check that the kernel's random numbers are ready."""
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return Finding("entropy", "fail", "the kernel's generator is not seeded", "enable rngd or virtio-rng, or wait")
    return Finding("entropy", "ok", "the kernel's generator is seeded")


def _clock_state() -> int:
    return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))


def check_clock(state: Callable[[], int] = _clock_state) -> Finding:
    """Check that the kernel knows its clock to be synchronised (adjtimex(2))."""
    if 0 <= state() < _TIME_ERROR:
        return Finding("clock", "ok", "synchronised")
    fix = "enable systemd-timesyncd, chrony or PTP: certificates and tokens have dates"
    return Finding("clock", "warn", "not synchronised", fix)


def check_directory(directory: Path, needed_bytes: int) -> Iterator[Finding]:
    """Check the state directory: it is there, private, and its disk has room."""
    check = "state directory"
    if not directory.is_dir():
        fix = f"install -d -m 0700 -o edgewarden -g edgewarden {directory} (the shipped unit makes it)"
        yield Finding(check, "fail", f"{directory} does not exist", fix)
        return
    yield from check_private(directory)
    free = shutil.disk_usage(directory).free
    text = f"{free // 1024**2} MiB free on the disk of {directory}"
    if free < needed_bytes:
        yield Finding("disk", "fail", text, f"free {needed_bytes // 1024**2} MiB or lower audit.budget_bytes")
    else:
        yield Finding("disk", "ok", text)


def check_private(path: Path) -> Iterator[Finding]:
    """Check that nobody but its owner may read or write a file, or a directory with what it holds at its top."""
    check = "permissions"
    try:
        paths = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
        modes = {found: stat.S_IMODE(found.lstat().st_mode) for found in paths if not found.is_symlink()}
    except OSError as error:
        yield Finding(check, "fail", f"{error.filename}: {error.strerror}", "check the path and who runs this command")
        return
    # Below a private directory only what is handed out of it matters; others can't reach it.
    loose = [found for found, mode in modes.items() if mode & 0o077]
    if modes.get(path, 0) & 0o077 and loose:
        others = f", and {len(loose) - 1} below it" if len(loose) > 1 else ""
        fix = f"chmod {'-R ' if others else ''}go= {path}"
        yield Finding(check, "fail", f"{path} is open to others (mode {modes[path]:04o}){others}", fix)
    else:
        yield Finding(check, "ok", f"{path} is private")


def check_open_files(hard_limit: int) -> Finding:
    """Check the limit of open files that the agent may raise itself to."""
    if hard_limit != resource.RLIM_INFINITY and hard_limit < MIN_OPEN_FILES:
        return Finding(
            "open files", "warn", f"limit {hard_limit}", f"set LimitNOFILE={MIN_OPEN_FILES} or more in the unit"
        )
    return Finding("open files", "ok", "no limit" if hard_limit == resource.RLIM_INFINITY else f"limit {hard_limit}")


def check_engine(engine: str, opa: str) -> Iterator[Finding]:
    """Check for the OPA binary, where the configuration wants it."""
    if engine != "opa":
        return
    path = shutil.which(opa)
    if path is None:
        yield Finding("opa", "fail", f"no executable {opa!r}", "install OPA 1.x, or set policy.engine to embedded")
        return
    version = re.search(r"Version: (\S+)", _output(path, "version"))
    if version is None:
        yield Finding("opa", "fail", f"{path} does not tell its version", "install OPA 1.x from its official release")
    else:
        yield Finding("opa", "ok", f"{path}, version {version[1]}")


def check_user(euid: int) -> Finding:
    """Check that this is not root, whose permissions say nothing about the service's."""
    if euid == 0:
        fix = "sudo -u edgewarden edgewarden doctor"
        return Finding("user", "warn", "this is root: checks of permissions say nothing about the service", fix)
    return Finding("user", "ok", f"unprivileged (uid {euid})")


def check_systemd(version_text: str) -> Finding:
    """Check systemd's version from what ``systemctl --version`` says; empty when there is none."""
    found = re.match(r"systemd (\d+)", version_text)
    if found is None:
        return Finding("systemd", "warn", "not found", "run the agent under another supervisor that restarts it")
    if int(found[1]) < MIN_SYSTEMD:
        return Finding("systemd", "warn", f"version {found[1]}", f"the shipped unit wants {MIN_SYSTEMD} or newer")
    return Finding("systemd", "ok", f"version {found[1]}")


def _output(*command: str) -> str:
    """Return what a program prints; empty when it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""  # the check says that it found nothing
