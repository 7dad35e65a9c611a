"""The filter programs, run by an interpreter of classic BPF: what they allow is what the allowlist says."""

import errno
import itertools
import re
import signal
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.isolation.bpf import ALLOW, KILL, Call, Condition, assemble, denied_with, encode
from agent.isolation.kernel import NUMBERS, syscall_number
from agent.isolation.profiles import ENOSYS_CALLS, Profile, allowlist

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
EPERM = denied_with(errno.EPERM)
PID = 4711
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS
WORD = 0xFFFFFFFF


def run(program, number, arguments=(), arch="x86_64", audit=None):
    """Interpret a program over one struct seccomp_data."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, ARCH[arch] if audit is None else audit, 0, *padded)
    at, accumulator = 0, 0
    while True:
        code, when_true, when_false, k = program[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:
                accumulator &= k
            case 0x15:
                at += when_true if accumulator == k else when_false
            case 0x35:
                at += when_true if accumulator >= k else when_false
            case 0x06:
                return k
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def holds(condition, arguments):
    value = arguments[condition.argument]
    return (value & condition.mask & WORD) in condition.values and not (condition.wide and value >> 32)


def program_of(profile, machine="x86_64", connect_port=None):
    return assemble(allowlist(profile, PID, connect_port), machine, missing=ENOSYS_CALLS)


EVERY = list(itertools.product(Profile, ARCH, [None, 8181]))

_words = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 0x1000, 0xFFFFFFFF, 2**32, 2**32 + 1, 2**63]) | st.integers(0, 2**64 - 1)
_conditions = st.builds(
    Condition,
    st.integers(0, 5),
    st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True).map(tuple),
    mask=st.sampled_from([WORD, 0xF, 0x1000, 3]),
    wide=st.booleans(),
)


@given(
    st.lists(st.lists(_conditions, max_size=3).map(tuple), max_size=3).map(tuple),
    st.lists(_words, min_size=6, max_size=6),
    st.sampled_from(["read", "write", "ioctl"]),
)
def test_a_call_is_allowed_exactly_when_an_alternative_holds(alternatives, arguments, asked):
    """For any conditions and arguments the program agrees with the definition of a call."""
    program = assemble([Call("write", alternatives), Call("read")], "x86_64")
    number = syscall_number(asked, "x86_64")
    expected = {
        "read": True,
        "write": not alternatives or any(all(holds(c, arguments) for c in conditions) for conditions in alternatives),
        "ioctl": False,
    }[asked]
    assert run(program, number, arguments) == (ALLOW if expected else EPERM)


@pytest.mark.parametrize(("profile", "machine", "port"), EVERY)
def test_programs_are_what_the_kernel_accepts(profile, machine, port):
    """Every jump stays inside, every path ends in a verdict, and the length is within the kernel's limit."""
    program = program_of(profile, machine, port)
    assert len(program) < MAX_INSTRUCTIONS
    assert len(encode(program)) == 8 * len(program)
    for at, (code, when_true, when_false, _) in enumerate(program):
        if code in {0x15, 0x35}:
            assert at + 1 + max(when_true, when_false) < len(program)
            assert max(when_true, when_false) < 256
    assert program[-1][0] == 0x06


@pytest.mark.parametrize(("profile", "machine", "port"), EVERY)
def test_calls_that_are_not_listed_are_denied(profile, machine, port):
    """Of all numbers the kernel may have, just the listed ones are not denied outright."""
    program = program_of(profile, machine, port)
    listed = {syscall_number(call.name, machine) for call in allowlist(profile, PID, port)}
    for number in set(range(600)) - listed:
        is_missing = number in {syscall_number(name, machine) for name in ENOSYS_CALLS}
        assert run(program, number, arch=machine) == (denied_with(errno.ENOSYS) if is_missing else EPERM)


@pytest.mark.parametrize(("profile", "machine", "port"), EVERY)
def test_a_foreign_machine_kills(profile, machine, port):
    """Numbers of another machine, i386 for one, are never looked up."""
    program = program_of(profile, machine, port)
    for audit in (0x40000003, 0, *(ARCH[other] for other in ARCH if other != machine)):
        assert run(program, 0, audit=audit) == KILL


@pytest.mark.parametrize("profile", list(Profile))
def test_x32_calls_kill(profile):
    """A number with the x32 bit kills on x86-64."""
    program = program_of(profile)
    for number in (0x40000000, 0x40000000 + 1, 0x40000000 + 520, WORD):
        assert run(program, number) == KILL


def verdict(profile, name, *arguments, machine="x86_64", port=None):
    return run(program_of(profile, machine, port), syscall_number(name, machine), arguments, machine) == ALLOW


THREAD = 0x3D0F00  # what glibc's pthread_create passes
FORK = 0x1200011  # what glibc's fork passes


@pytest.mark.parametrize("machine", list(ARCH))
@pytest.mark.parametrize(
    ("profile", "thread", "fork", "signal_itself"),
    [
        (Profile.GATEWAY, True, False, True),
        (Profile.INSPECTOR, True, False, True),
        (Profile.POLICY_TEMPLATE, False, True, False),
        (Profile.POLICY_WORKER, False, False, False),
    ],
)
def test_who_may_start_threads_and_processes_and_signal(machine, profile, thread, fork, signal_itself):
    """Threads: gateway and inspector; processes: the template; signals: to itself, where it has no heirs."""
    assert verdict(profile, "clone", THREAD, machine=machine) is thread
    assert verdict(profile, "clone", FORK, machine=machine) is fork
    for forbidden in (0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x4000, 0x1000, 0x2000, 0x8000):
        assert not verdict(profile, "clone", THREAD | forbidden, machine=machine)
        assert not verdict(profile, "clone", FORK | forbidden, machine=machine)
    assert verdict(profile, "kill", PID, signal.SIGTERM, machine=machine) is signal_itself
    assert verdict(profile, "tgkill", PID, PID + 1, 6, machine=machine) is signal_itself
    for other in (0, 1, PID + 1, WORD, 2**64 - 1):
        assert not verdict(profile, "kill", other, 9, machine=machine)
        assert not verdict(profile, "tgkill", other, other, 9, machine=machine)


@pytest.mark.parametrize("profile", list(Profile))
def test_memory_never_becomes_executable(profile):
    """PROT_EXEC is refused in mmap and mprotect, with whatever else stands beside it."""
    for name in ("mmap", "mprotect"):
        for protection in range(16):
            assert verdict(profile, name, 0, 4096, protection) is not bool(protection & 4)


@pytest.mark.parametrize("profile", list(Profile))
def test_sockets_exist_only_with_a_connect_port(profile):
    """Without one there is no socket and no connect; with one just TCP over IPv4 and IPv6, without Fast Open."""
    assert not verdict(profile, "socket", 2, 1, 0)
    assert not verdict(profile, "connect", 3)
    allowed = {(2, 1, 0), (2, 1, 6), (10, 1, 0), (10, 0x80801, 6)}
    for family, kind, protocol in itertools.product(
        (1, 2, 10, 16, 17, 40), (1, 2, 3, 5, 0x80801), (0, 6, 17, 132, 262)
    ):
        expected = (family, kind & 0xF, protocol) in {(f, k & 0xF, p) for f, k, p in allowed} | {(2, 1, 6), (10, 1, 0)}
        assert verdict(profile, "socket", family, kind, protocol, port=1) is expected
    assert verdict(profile, "connect", 3, port=1)
    assert verdict(profile, "sendto", 3, 0, 0, 0x4000, port=1)
    assert not verdict(profile, "sendto", 3, 0, 0, 0x20000000 | 0x4000, port=1)
    assert not verdict(profile, "sendmsg", 3, 0, 0x20000000, port=1)


def test_a_worker_is_the_narrowest():
    """A worker may do nothing that its template may not, and cannot stack, fork or prctl its way out."""
    worker = {call.name for call in allowlist(Profile.POLICY_WORKER, PID)}
    template = {call.name for call in allowlist(Profile.POLICY_TEMPLATE, PID)}
    assert worker < template
    assert template - worker == {"clone", "seccomp", "wait4", "waitid", "pipe2", "close_range"}
    assert verdict(Profile.POLICY_TEMPLATE, "prctl", 1, signal.SIGKILL)
    assert not verdict(Profile.POLICY_TEMPLATE, "prctl", 1, 0)
    assert not verdict(Profile.POLICY_WORKER, "prctl", 1, signal.SIGKILL)
    assert verdict(Profile.POLICY_TEMPLATE, "seccomp", 1, 0)
    assert not verdict(Profile.POLICY_TEMPLATE, "seccomp", 1, 8)  # a listener could answer for the kernel


def test_limits_can_be_read_and_not_set():
    """prlimit64 works on the process itself with no new limit, whose pointer counts with all 64 bits."""
    assert verdict(Profile.GATEWAY, "prlimit64", 0, 3, 0)
    for arguments in ((0, 3, 1), (0, 3, 2**32), (1, 3, 0)):
        assert not verdict(Profile.GATEWAY, "prlimit64", *arguments)


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernel_headers(column, header):
    """The table agrees with the kernel's own headers, where this host has them."""
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    found["newfstatat"] = found.get("newfstatat", found.get("fstatat"))
    assert {name: found.get(name) for name in NUMBERS} == {
        name: None if numbers[column] is None else str(numbers[column]) for name, numbers in NUMBERS.items()
    }
