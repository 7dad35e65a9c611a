"""What agent and zygote say to each other; both are ours, and yet every message is validated.

A spawn request is one frame whose descriptors are, in this order: the status socket, the child's channel (not for a
program), and the named ones. All that follows comes over the status socket, one JSON value a message: :class:`Forked` by
the zygote, then :class:`Confined` or :class:`Failed` by the child; its end without either means that the child died.
"""

from typing import Any

import msgspec

from agent.isolation.sandbox import Limits, Profile, SandboxReport

__all__ = [
    "Confined",
    "EntryRequest",
    "Failed",
    "Forked",
    "ProgramRequest",
    "Ready",
    "Request",
    "Status",
    "ZygoteOptions",
]


class ZygoteOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The zygote's command line.

    Attributes:
        channel_fd: the inherited end of its channel.
        agent_pid: its parent; when that dies, it dies.
        preload: modules to import before the first fork.
        user: uid and gid for every child; None leaves them as they are.
        sandbox_required: no child without Landlock and seccomp.
    """

    channel_fd: int
    agent_pid: int
    preload: tuple[str, ...]
    user: tuple[int, int] | None
    sandbox_required: bool


class EntryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="entry"):
    """Fork a child that runs ``entry`` (``module:function``)."""

    entry: str
    profile: Profile
    limits: Limits
    args: dict[str, Any]
    fds: tuple[str, ...]
    connect_port: int | None
    landlock: bool
    seccomp: bool


class ProgramRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="program"):
    """Fork a child that becomes an external program; it inherits the descriptors ``fds``, by name."""

    argv: tuple[str, ...]
    env: dict[str, str]
    limits: Limits
    fds: tuple[str, ...] = ()


Request = EntryRequest | ProgramRequest


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ready"):
    """The zygote has imported everything and waits for requests."""


class Forked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="forked"):
    """There is a process, whose parent the agent is."""

    pid: int


class Confined(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="confined"):
    """The child has entered its sandbox."""

    report: SandboxReport


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="failed"):
    """The child or the zygote could not do it; ``message`` says why."""

    message: str


Status = Ready | Forked | Confined | Failed
