"""What each kind of child may ask of the kernel: one allowlist for each profile.

Rules:

1. Default deny: no profile opens a path, runs a program, traces, or reaches another process, and none has io_uring, bpf,
   perf or namespaces; they are absent from these lists.
2. Memory never becomes executable, from whatever source: ``PR_SET_MDWE`` would still map a received memfd as code.
3. Signals go to the process itself. The template may not signal at all, for its filter is inherited by its workers, which
   have another pid.
4. Threads only in gateway and inspector, processes only in the template, neither in a worker.
5. ``connect_port`` adds TCP stream sockets of exactly that protocol: MPTCP and TCP Fast Open would slip past Landlock.
"""

import enum
import signal

from agent.isolation.bpf import Call, Condition

__all__ = ["ENOSYS_CALLS", "Profile", "allowlist"]


class Profile(enum.Enum):
    """The kinds of sandboxed children."""

    GATEWAY = "gateway"
    POLICY_TEMPLATE = "policy-template"
    POLICY_WORKER = "policy-worker"
    INSPECTOR = "inspector"


# glibc falls back to clone, whose flags a filter can see; those of clone3 stand behind a pointer.
ENOSYS_CALLS = ("clone3",)

_PROT_EXEC = 0x4
_AT_EMPTY_PATH = 0x1000
_CLONE_THREAD_BITS = 0x00010000 | 0x00000100 | 0x00000800  # THREAD, VM, SIGHAND
# NEWTIME, PIDFD, PTRACE, VFORK, PARENT, NEWNS, UNTRACED, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_CLONE_FORBIDDEN_BITS = 0x80 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x20000 | 0x800000 | 0x7E000000
_CLONE_FORK_OPTIONAL_BITS = 0x00200000 | 0x01000000  # CHILD_CLEARTID, CHILD_SETTID
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE = 1, 15, 16, 3
_SECCOMP_SET_MODE_FILTER = 1
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_TYPE_MASK = 1, 0xF
_IPPROTO_IP, _IPPROTO_TCP = 0, 6
_MSG_FASTOPEN = 0x20000000
_SOL_SOCKET = 1
_SOCKET_OPTIONS = (2, 7, 8, 9, 13)  # REUSEADDR, SNDBUF, RCVBUF, KEEPALIVE, LINGER
_TCP_OPTIONS = (1, 3, 4, 5, 6, 12, 18)  # NODELAY, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, QUICKACK, USER_TIMEOUT
_IOCTLS = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS (isatty), FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1033, 1034)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, ADD_SEALS, GET_SEALS


def _plain(names: str) -> tuple[Call, ...]:
    return tuple(Call(name) for name in names.split())


# Conditional calls first: the kernel answers the others from a bitmap without running the filter.
_COMMON_CONDITIONAL = (
    Call("mmap", ((Condition(2, (0,), mask=_PROT_EXEC),),)),
    Call("mprotect", ((Condition(2, (0,), mask=_PROT_EXEC),),)),
    Call("fcntl", ((Condition(1, _FCNTLS),),)),
    Call("ioctl", ((Condition(1, _IOCTLS),),)),
    Call("newfstatat", ((Condition(3, (_AT_EMPTY_PATH,)),),)),
    # Reading a limit of its own, which pthread_getattr_np does; the new limit must be NULL.
    Call("prlimit64", ((Condition(0, (0,)), Condition(2, (0,), wide=True)),)),
)
_COMMON = _plain(
    """
    read write readv writev pread64 lseek fstat close dup
    sendto sendmsg recvfrom recvmsg shutdown getsockopt getsockname getpeername
    poll ppoll select pselect6
    brk munmap mremap madvise
    futex set_robust_list rseq sched_yield sched_getaffinity getcpu
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday
    getpid getppid gettid getuid geteuid getgid getegid
    getrandom getrusage uname sysinfo
    exit exit_group
    """
)
_PRCTL_NAMES = (Condition(0, (_PR_SET_NAME, _PR_GET_NAME, _PR_GET_DUMPABLE)),)
_PRCTL_PDEATHSIG = (Condition(0, (_PR_SET_PDEATHSIG,)), Condition(1, (signal.SIGKILL,), wide=True))

_THREADS = Call("clone", ((Condition(0, (_CLONE_THREAD_BITS,), mask=_CLONE_THREAD_BITS | _CLONE_FORBIDDEN_BITS),),))
_FORK = Call("clone", ((Condition(0, (signal.SIGCHLD,), mask=0xFFFFFFFF & ~_CLONE_FORK_OPTIONAL_BITS),),))
_STACK_FILTER = Call("seccomp", ((Condition(0, (_SECCOMP_SET_MODE_FILTER,)), Condition(1, (0,))),))
_EVENT_LOOP = _plain(
    """
    epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 timerfd_create timerfd_settime pipe2
    accept accept4 listen
    """
)
_SETSOCKOPT = Call(
    "setsockopt",
    (
        (Condition(1, (_SOL_SOCKET,)), Condition(2, _SOCKET_OPTIONS)),
        (Condition(1, (_IPPROTO_TCP,)), Condition(2, _TCP_OPTIONS)),
    ),
)


def allowlist(profile: Profile, pid: int, connect_port: int | None = None) -> list[Call]:
    """Return what a process of this profile may call.

    Args:
        profile: its kind.
        pid: its own, the only one that it may signal.
        connect_port: when given, TCP stream sockets and ``connect`` are allowed; Landlock holds the port.
    """
    to_itself = ((Condition(0, (pid,)),),)
    calls: tuple[Call, ...]
    match profile:
        case Profile.GATEWAY:
            calls = (
                Call("kill", to_itself),
                Call("tgkill", to_itself),
                Call("prctl", (_PRCTL_NAMES,)),
                Call("socketpair", ((Condition(0, (_AF_UNIX,)),),)),
                _THREADS,
                _SETSOCKOPT,
                *_EVENT_LOOP,
            )
        case Profile.INSPECTOR:
            calls = (Call("kill", to_itself), Call("tgkill", to_itself), Call("prctl", (_PRCTL_NAMES,)), _THREADS)
        case Profile.POLICY_TEMPLATE:
            processes = _plain("wait4 waitid pipe2 close_range")
            calls = (Call("prctl", (_PRCTL_NAMES, _PRCTL_PDEATHSIG)), _FORK, _STACK_FILTER, *processes)
        case Profile.POLICY_WORKER:
            calls = (Call("prctl", (_PRCTL_NAMES,)),)
    allowed = [*_COMMON_CONDITIONAL, *calls, *_COMMON]
    return allowed if connect_port is None else _with_tcp(allowed)


def _with_tcp(calls: list[Call]) -> list[Call]:
    no_fast_open = {
        "sendto": Call("sendto", ((Condition(3, (0,), mask=_MSG_FASTOPEN),),)),
        "sendmsg": Call("sendmsg", ((Condition(2, (0,), mask=_MSG_FASTOPEN),),)),
    }
    tcp = (
        Condition(0, (_AF_INET, _AF_INET6)),
        Condition(1, (_SOCK_STREAM,), mask=_SOCK_TYPE_MASK),
        Condition(2, (_IPPROTO_IP, _IPPROTO_TCP)),
    )
    added = {call.name: call for call in (Call("socket", (tcp,)), Call("connect"), _SETSOCKOPT, *_EVENT_LOOP)}
    for name in ("accept", "accept4", "listen"):
        del added[name]
    present = {call.name for call in calls}
    return [
        *(no_fast_open.get(call.name, call) for call in calls),
        *(call for name, call in added.items() if name not in present),
    ]
