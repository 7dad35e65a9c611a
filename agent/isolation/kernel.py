"""The kernel's calls that Python does not offer: ``prctl`` and raw system calls.

Rules:

1. An error of the kernel is an ``OSError`` with its errno; nothing is ignored here.
2. System calls are named; their numbers stand in one table for the two machines that we run on, x86-64 and aarch64.
"""

import ctypes
import os
import platform

__all__ = ["MACHINE", "NUMBERS", "prctl", "set_name", "syscall", "syscall_number"]

MACHINE = platform.machine()
_COLUMN = {"x86_64": 0, "aarch64": 1}
_NAME_BYTES = 15  # TASK_COMM_LEN - 1
_PR_SET_NAME = 15

# name: (x86-64, aarch64), from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; None where
# the machine has no such call.
NUMBERS: dict[str, tuple[int, int | None]] = {
    "accept": (43, 202),
    "accept4": (288, 242),
    "brk": (12, 214),
    "capset": (126, 91),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "close_range": (436, 436),
    "connect": (42, 203),
    "dup": (32, 23),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "epoll_wait": (232, None),
    "eventfd2": (290, 19),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpeername": (52, 205),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "listen": (50, 201),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "prctl": (157, 167),
    "pread64": (17, 67),
    "prlimit64": (302, 261),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readv": (19, 65),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "seccomp": (317, 277),
    "select": (23, None),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "setsockopt": (54, 208),
    "shutdown": (48, 210),
    "sigaltstack": (131, 132),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "sysinfo": (99, 179),
    "tgkill": (234, 131),
    "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86),
    "uname": (63, 160),
    "wait4": (61, 260),
    "waitid": (247, 95),
    "write": (1, 64),
    "writev": (20, 66),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def syscall_number(name: str, machine: str = MACHINE) -> int | None:
    """Return a system call's number on ``machine``; None where it does not exist."""
    return NUMBERS[name][_COLUMN[machine]]


def syscall(name: str, *args: int) -> int:
    """Make a raw system call with integer arguments (addresses included).

    Raises:
        OSError: with the kernel's errno.
    """
    number = syscall_number(name)
    result = int(_libc.syscall(ctypes.c_long(-1 if number is None else number), *map(ctypes.c_ulong, args)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, *args: int) -> int:
    """Call ``prctl(option, ...)``; missing arguments are 0.

    Raises:
        OSError: with the kernel's errno.
    """
    return syscall("prctl", option, *args, *([0] * (4 - len(args))))


def set_name(name: str) -> None:
    """Name this process for ``ps`` and ``top``; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:_NAME_BYTES])
    prctl(_PR_SET_NAME, ctypes.addressof(buffer))
