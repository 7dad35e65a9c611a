"""The service's words to systemd: the ``sd_notify`` protocol, one datagram a message (sd_notify(3)).

Rules:

1. Without an address (not started by systemd) nothing is sent.
2. A message never blocks, and a status text can't smuggle in another assignment.
"""

from __future__ import annotations

import socket

from agent.errors import HostError

__all__ = ["Notifier"]

MAX_STATUS_CHARACTERS = 512


class Notifier:
    """Speaks to the service manager.

    Args:
        address: value of ``NOTIFY_SOCKET`` as :mod:`agent.config` read it; None or empty when there is none.

    Raises:
        HostError: the address is no socket that this protocol knows.
    """

    def __init__(self, address: str | None) -> None:
        self._address = ""
        if not address:
            return
        if address[0] not in "/@":
            raise HostError(f"notify: {address!r} is no Unix socket")
        self._address = "\0" + address[1:] if address[0] == "@" else address

    def ready(self) -> None:
        """Say that the service does its work."""
        self._send("READY=1")

    def watchdog(self) -> None:
        """Say that the service is alive; more often than the unit's ``WatchdogSec``."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the service is on its way out."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``."""
        self._send("STATUS=" + " ".join(text.split())[:MAX_STATUS_CHARACTERS])

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            raise HostError(f"notify: the service manager can't be reached: {error.strerror}") from error
