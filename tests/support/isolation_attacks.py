"""What a hostile child would try, as raw system calls, with the layer that claims to stop each attempt.

Every row is tried in four children: with all layers, with Landlock alone, with seccomp alone, and with neither. A row is
refused exactly where a layer that is named in it is in force; a row that names one layer is stopped by that one only.
Landlock stands by the ABI that brought the rule, ptrace and its kin by the first. The child with neither layer proves that the attempt is real: it succeeds there, or fails for a reason of its own.
"""

import ctypes
import errno
import json
import os
import platform
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.isolation.channel import Channel
from agent.isolation.child import Child
from agent.isolation.sandbox import SandboxReport

SECCOMP = "seccomp"
FILES, TRUNCATE, NETWORK, SCOPES = "landlock 1", "landlock 3", "landlock 4", "landlock 6"  # by the ABI that brought it
MDWE = "mdwe"
CAPABILITIES = "capabilities"  # dropped in every child


def layers_in_force(report: SandboxReport) -> set[str]:
    """Return what holds in a child, by its own report."""
    in_force = {CAPABILITIES, *[SECCOMP] * report.seccomp, *[MDWE] * report.mdwe}
    return in_force | {
        layer for abi, layer in ((1, FILES), (3, TRUNCATE), (4, NETWORK), (6, SCOPES)) if report.landlock_abi >= abi
    }


REFUSED = (errno.EPERM, errno.EACCES)

# x86-64, aarch64
_NUMBERS = {
    "add_key": (248, 217),
    "bind": (49, 200),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fchmodat": (268, 53),
    "fcntl": (72, 25),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kill": (62, 129),
    "landlock_create_ruleset": (444, 444),
    "memfd_create": (319, 279),
    "mkdirat": (258, 34),
    "mmap": (9, 222),
    "mount": (165, 40),
    "mprotect": (10, 226),
    "newfstatat": (262, 79),
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "socket": (41, 198),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "truncate": (76, 45),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
_AT_FDCWD = 2**64 - 100
_SIGCHLD = 17
_PAGE = 4096
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_kept: list[Any] = []  # buffers that the kernel is pointed at


def _sys(name: str, *args: int) -> int:
    """Return the result, or minus the errno."""
    number = _NUMBERS[name][_COLUMN]
    if number is None:
        return -errno.ENOSYS
    result = int(_libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args)))
    return result if result >= 0 else -ctypes.get_errno()


def _at(data: bytes) -> int:
    buffer = ctypes.create_string_buffer(data, len(data))
    _kept.append(buffer)
    return ctypes.addressof(buffer)


def _text(path: str) -> int:
    return _at(path.encode() + b"\0")


@dataclass(frozen=True, slots=True)
class Row:
    """One attempt.

    Attributes:
        layers: those that claim to stop it.
        run: given the child and its arguments; returns the kernel's result or minus an errno.
        surely: the attempt gets through where no layer is in force; False where the host may refuse it as well.
        but: profiles to which the call is allowed.
    """

    name: str
    layers: frozenset[str]
    run: Callable[["Target"], int]
    surely: bool = True
    but: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    agent: int
    victim: int
    address: int
    port: int
    files: str
    abstract: str
    fds: dict[str, int]


def _fork(number: str, *args: int) -> int:
    result = _sys(number, *args)
    if result == 0:
        os._exit(0)
    if result > 0:
        os.waitpid(result, 0)
    return result


def _exec_memfd(_: Target) -> int:
    fd = _sys("memfd_create", _text("code"), 0)
    # The vector is no address: a kernel that would run the file finds that out, and says EFAULT.
    return fd if fd < 0 else _sys("execveat", fd, _text(""), 1, 0, 0x1000)


def _anonymous(protection: int) -> int:
    return _sys("mmap", 0, _PAGE, protection, 0x22, 2**64 - 1, 0)


def _mprotect(_: Target) -> int:
    return _sys("mprotect", _anonymous(3), _PAGE, 5)


def _vm(name: str, t: Target) -> int:
    mine = ctypes.create_string_buffer(16)
    _kept.append(mine)
    local = _at(struct.pack("<QQ", ctypes.addressof(mine), 16))
    return _sys(name, t.victim, local, 1, _at(struct.pack("<QQ", t.address, 16)), 1, 0)


def _inet(port: int) -> int:
    return _at(struct.pack("<H", 2) + struct.pack(">H", port) + bytes([127, 0, 0, 1]) + bytes(8))


def _unix(t: Target, name: bytes) -> int:
    address = struct.pack("<H", 1) + name
    return _sys("connect", t.fds["unix"], _at(address), len(address))


def _queue(name: str, *ids: int) -> int:
    return _sys(name, *ids, 0, _at(struct.pack("<iii", 0, 0, -1) + bytes(116)))


def _file(path: str) -> int:
    return _sys("openat", _AT_FDCWD, _text(path), 0, 0)


_ONLY_SECCOMP = frozenset({SECCOMP})
_OR_FILES = frozenset({SECCOMP, FILES})
_OR_TRUNCATE = frozenset({SECCOMP, TRUNCATE})
_OR_NETWORK = frozenset({SECCOMP, NETWORK})
_OR_SCOPES = frozenset({SECCOMP, SCOPES})
_OR_MDWE = frozenset({SECCOMP, MDWE})
_OR_CAPABILITIES = frozenset({SECCOMP, CAPABILITIES})
_OR_FILES_OR_CAPABILITIES = frozenset({SECCOMP, FILES, CAPABILITIES})

ROWS = (
    # files
    Row("open", _OR_FILES, lambda _: _sys("open", _text("/etc/passwd"), 0), surely=platform.machine() == "x86_64"),
    Row("openat", _OR_FILES, lambda _: _file("/etc/passwd")),
    Row("openat2", _OR_FILES, lambda _: _sys("openat2", _AT_FDCWD, _text("/etc/passwd"), _at(bytes(24)), 24)),
    Row("open /proc/<victim>/mem", _OR_FILES, lambda t: _file(f"/proc/{t.victim}/mem")),
    Row("open own /proc/self/mem", _OR_FILES, lambda _: _file("/proc/self/mem"), surely=False),
    Row("truncate", _OR_TRUNCATE, lambda t: _sys("truncate", _text(f"{t.files}/kept"), 0)),
    Row("unlink", _OR_FILES, lambda t: _sys("unlinkat", _AT_FDCWD, _text(f"{t.files}/removed"), 0)),
    Row("mkdir", _OR_FILES, lambda t: _sys("mkdirat", _AT_FDCWD, _text(f"{t.files}/made"), 0o700)),
    Row("chmod", _ONLY_SECCOMP, lambda t: _sys("fchmodat", _AT_FDCWD, _text(f"{t.files}/kept"), 0o600)),
    Row("stat", _ONLY_SECCOMP, lambda _: _sys("newfstatat", _AT_FDCWD, _text("/etc"), _at(bytes(256)), 0)),
    Row("chroot", _OR_CAPABILITIES, lambda _: _sys("chroot", _text("/"))),
    Row(
        "mount", _OR_FILES_OR_CAPABILITIES, lambda _: _sys("mount", _text("none"), _text("/mnt"), _text("tmpfs"), 0, 0)
    ),
    # network
    Row("socket inet stream", _ONLY_SECCOMP, lambda _: _sys("socket", 2, 1, 0)),
    Row("socket inet datagram", _ONLY_SECCOMP, lambda _: _sys("socket", 2, 2, 0)),
    Row("socket unix", _ONLY_SECCOMP, lambda _: _sys("socket", 1, 1, 0)),
    Row("socket netlink", _ONLY_SECCOMP, lambda _: _sys("socket", 16, 3, 0)),
    Row("socket packet", _OR_CAPABILITIES, lambda _: _sys("socket", 17, 3, 0)),
    Row("bind tcp", _OR_NETWORK, lambda t: _sys("bind", t.fds["bind"], _inet(0), 16)),
    Row("connect tcp", _OR_NETWORK, lambda t: _sys("connect", t.fds["connect"], _inet(t.port), 16)),
    Row("connect abstract unix", _OR_SCOPES, lambda t: _unix(t, b"\0" + t.abstract.encode())),
    Row("connect unix by path", _ONLY_SECCOMP, lambda t: _unix(t, f"{t.files}/listener".encode() + b"\0")),
    # code
    Row("execve", _OR_FILES, lambda _: _sys("execve", _text("/bin/true"), 1, 0)),
    Row("memfd_create and execveat", _ONLY_SECCOMP, _exec_memfd),
    Row("mmap executable", _ONLY_SECCOMP, lambda _: _anonymous(5)),
    Row("mmap writable and executable", _OR_MDWE, lambda _: _anonymous(7)),
    Row("mmap a received memfd as code", _ONLY_SECCOMP, lambda t: _sys("mmap", 0, _PAGE, 5, 2, t.fds["memfd"], 0)),
    Row("mprotect to executable", _OR_MDWE, _mprotect),
    # processes
    Row("fork", _ONLY_SECCOMP, lambda _: _fork("clone", _SIGCHLD, 0, 0, 0, 0), but=("policy-template",)),
    Row("vfork", _ONLY_SECCOMP, lambda _: _fork("clone", 0x4000 | _SIGCHLD, 0, 0, 0, 0)),
    Row(
        "clone into a namespace",
        _ONLY_SECCOMP,
        lambda _: _fork("clone", 0x10000000 | _SIGCHLD, 0, 0, 0, 0),
        surely=False,
    ),
    Row("clone3", _ONLY_SECCOMP, lambda _: _fork("clone3", _at(struct.pack("<8Q", 0, 0, 0, 0, _SIGCHLD, 0, 0, 0)), 64)),
    Row("kill the agent", _OR_SCOPES, lambda t: _sys("kill", t.agent, 0)),
    # The kernel answers 0 for -1 and for a group whatever a security module said of each process.
    Row("kill everyone", _ONLY_SECCOMP, lambda _: _sys("kill", 2**64 - 1, 0)),
    Row("kill the group", _ONLY_SECCOMP, lambda _: _sys("kill", 0, 0)),
    Row("tkill", _OR_SCOPES, lambda t: _sys("tkill", t.victim, 0)),
    Row("tgkill", _OR_SCOPES, lambda t: _sys("tgkill", t.victim, t.victim, 0)),
    Row("rt_sigqueueinfo", _OR_SCOPES, lambda t: _queue("rt_sigqueueinfo", t.victim)),
    Row("rt_tgsigqueueinfo", _OR_SCOPES, lambda t: _queue("rt_tgsigqueueinfo", t.victim, t.victim)),
    Row("pidfd_open", _ONLY_SECCOMP, lambda t: _sys("pidfd_open", t.victim, 0)),
    Row("pidfd_send_signal", _OR_SCOPES, lambda t: _sys("pidfd_send_signal", t.fds["pidfd"], 0, 0, 0)),
    Row("pidfd_getfd", _OR_FILES, lambda t: _sys("pidfd_getfd", t.fds["pidfd"], 0, 0)),
    Row("fcntl F_SETOWN", _ONLY_SECCOMP, lambda t: _sys("fcntl", t.fds["unix"], 8, t.victim)),
    Row("ptrace", _OR_FILES, lambda t: _sys("ptrace", 0x4206, t.victim, 0, 0)),
    Row("process_vm_readv", _OR_FILES, lambda t: _vm("process_vm_readv", t)),
    Row("process_vm_writev", _OR_FILES, lambda t: _vm("process_vm_writev", t)),
    Row("kcmp", _OR_FILES, lambda t: _sys("kcmp", os.getpid(), t.victim, 1, 0, 0), surely=False),
    Row("prlimit of another", _ONLY_SECCOMP, lambda t: _sys("prlimit64", t.victim, 7, 0, _at(bytes(16)))),
    Row("prlimit of its own, to change it", _ONLY_SECCOMP, lambda _: _sys("prlimit64", 0, 4, _at(bytes(16)), 0)),
    Row(
        "sched_setaffinity of another",
        _ONLY_SECCOMP,
        lambda t: _sys("sched_setaffinity", t.victim, 8, _at(b"\xff" * 8)),
    ),
    Row("setpriority of another", _ONLY_SECCOMP, lambda t: _sys("setpriority", 0, t.victim, 19)),
    # out of the sandbox
    Row("prctl PR_SET_DUMPABLE", _ONLY_SECCOMP, lambda _: _sys("prctl", 4, 1, 0, 0, 0)),
    Row("prctl PR_SET_PDEATHSIG off", _ONLY_SECCOMP, lambda _: _sys("prctl", 1, 0, 0, 0, 0)),
    Row("landlock_create_ruleset", _ONLY_SECCOMP, lambda _: _sys("landlock_create_ruleset", 0, 0, 1)),
    Row("unshare files", _ONLY_SECCOMP, lambda _: _sys("unshare", 0x400)),
    Row("setns", _ONLY_SECCOMP, lambda t: _sys("setns", t.fds["unix"], 0)),
    # large kernel surfaces
    Row("io_uring_setup", _ONLY_SECCOMP, lambda _: _sys("io_uring_setup", 1, _at(bytes(120))), surely=False),
    Row("bpf", _ONLY_SECCOMP, lambda _: _sys("bpf", 5, _at(bytes(128)), 128), surely=False),
    Row(
        "perf_event_open",
        _ONLY_SECCOMP,
        lambda _: _sys("perf_event_open", _at(bytes(128)), 0, 2**64 - 1, 2**64 - 1, 0),
        surely=False,
    ),
    Row("userfaultfd", _ONLY_SECCOMP, lambda _: _sys("userfaultfd", 1), surely=False),
    Row(
        "add_key",
        _ONLY_SECCOMP,
        lambda _: _sys("add_key", _text("user"), _text("x"), _text("y"), 1, 2**64 - 2),
        surely=False,
    ),
    Row("unshare into a user namespace", _ONLY_SECCOMP, lambda _: _sys("unshare", 0x10000000), surely=False),
)


def attack(child: Child) -> None:
    """Try every row and send the results by name."""
    _libc.syscall(ctypes.c_long(-1))  # ctypes has set itself up
    target = Target(fds=child.fds, **child.args)
    child.enter_sandbox()
    results = {row.name: min(row.run(target), 0) for row in ROWS}
    Channel(child.channel).send(json.dumps(results).encode())


def victim(child: Child) -> None:
    """Be readable and signalable by others of this user; tell where a secret is, and wait."""
    secret = ctypes.create_string_buffer(b"0123456789abcdef")
    child.enter_sandbox()
    _sys("prctl", 4, 1, 0, 0, 0)
    channel = Channel(child.channel)
    channel.send(str(ctypes.addressof(secret)).encode())
    channel.receive()
