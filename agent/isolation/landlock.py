"""Landlock: take every filesystem right, TCP, and the reach to other processes away from this thread.

Rules (Documentation/userspace-api/landlock.rst):

1. Every right that the kernel's ABI knows is handled and none is granted; one TCP port may be left to connect to.
2. ABI 4 adds TCP, ABI 6 adds scopes: abstract Unix sockets and signals outside of the sandbox. What an older kernel does
   not give is for the caller to report.
"""

import ctypes
import os
import struct

from agent.isolation.kernel import syscall

__all__ = ["ABI_NETWORK", "ABI_SCOPES", "abi", "restrict"]

ABI_NETWORK = 4
ABI_SCOPES = 6

_CREATE_VERSION = 1
_RULE_NET_PORT = 2
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2
# The number of filesystem rights, by the ABI that brought the last of them: 13 in the first, then REFER, TRUNCATE, IOCTL_DEV.
_FILE_RIGHTS_BY_ABI = ((5, 16), (3, 15), (2, 14), (1, 13))


def abi() -> int:
    """Return the kernel's Landlock ABI; 0 where Landlock is not built in or not enabled."""
    try:
        return syscall("landlock_create_ruleset", 0, 0, _CREATE_VERSION)
    except OSError:
        return 0


def restrict(version: int, connect_port: int | None = None) -> None:
    """Enter the sandbox; needs no_new_privs. Threads that already run are not covered.

    Args:
        version: what :func:`abi` returned, at least 1.
        connect_port: a TCP port to leave open for ``connect``; without effect before ABI 4.

    Raises:
        OSError: the kernel refuses.
    """
    rights = next(count for since, count in _FILE_RIGHTS_BY_ABI if version >= since)
    network = _BIND_TCP | _CONNECT_TCP if version >= ABI_NETWORK else 0
    scopes = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= ABI_SCOPES else 0
    # struct landlock_ruleset_attr; an older kernel takes the longer struct as long as what it does not know is 0.
    attributes = ctypes.create_string_buffer(struct.pack("<QQQ", (1 << rights) - 1, network, scopes), 24)
    ruleset = syscall("landlock_create_ruleset", ctypes.addressof(attributes), 24, 0)
    try:
        if connect_port is not None and network:
            rule = ctypes.create_string_buffer(struct.pack("<QQ", _CONNECT_TCP, connect_port), 16)
            syscall("landlock_add_rule", ruleset, _RULE_NET_PORT, ctypes.addressof(rule), 0)
        syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
