"""Templates that do not do what a template does."""

import hashlib
import os

import msgspec

from agent.isolation.channel import Channel
from agent.isolation.child import Child
from agent.isolation.memfd import map_sealed
from agent.policy.worker import Forked, Loaded, Refused


def _begin(child: Child) -> tuple[Channel, Loaded]:
    child.enter_sandbox()
    digest = hashlib.sha256(bytes(map_sealed(child.fds["bundle"]))).hexdigest()
    return Channel(child.channel), Loaded("liar", digest)


def _say(channel: Channel, *reports: object) -> None:
    for report in reports:
        channel.send(msgspec.json.encode(report))


def _wait(channel: Channel) -> None:
    while channel.receive() is not None:
        pass


def lies(child: Child) -> None:
    """Claim other bytes."""
    channel, _ = _begin(child)
    _say(channel, Loaded("liar", "0" * 64))
    _wait(channel)


def mute(child: Child) -> None:
    """Say nothing."""
    channel, _ = _begin(child)
    _wait(channel)


def talks(child: Child) -> None:
    """Answer what was not asked."""
    channel, _ = _begin(child)
    _say(channel, Forked(1))
    _wait(channel)


def babbles(child: Child) -> None:
    """Talk nonsense."""
    channel, _ = _begin(child)
    channel.send(b"{")
    _wait(channel)


def deserts(child: Child) -> None:
    """End without a word."""
    _begin(child)


def stranger(child: Child) -> None:
    """Name a pid that is nobody's child."""
    channel, loaded = _begin(child)
    _say(channel, loaded)
    channel.receive()
    _say(channel, Forked(1), Forked(os.getpid()))
    _wait(channel)


def barren(child: Child) -> None:
    """Refuse to fork."""
    channel, loaded = _begin(child)
    _say(channel, loaded)
    channel.receive()
    _say(channel, Refused("isolation", "no"))
    _wait(channel)


def silent(child: Child) -> None:
    """Load, then never answer."""
    channel, loaded = _begin(child)
    _say(channel, loaded)
    _wait(channel)


def refuses(child: Child) -> None:
    """Refuse the bundle for a fault of the machine."""
    channel, _ = _begin(child)
    _say(channel, Refused("isolation", "not sealed"))
