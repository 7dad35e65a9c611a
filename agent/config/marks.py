"""What the sections of the configuration share: the mark of a setting that decides what is enforced, and the form of an address."""

import ipaddress
from typing import Any

from msgspec import Meta

__all__ = ["SECURITY", "security", "split_listen"]

SECURITY = {"security": True}


def security(description: str, **limits: Any) -> Meta:  # noqa: ANN401 -- passes msgspec's own constraints through
    """Describe a setting that decides what the node enforces, and that is measured therefore."""
    return Meta(description=description, extra_json_schema=SECURITY, **limits)


def split_listen(listen: str) -> tuple[str, int]:
    """Split ``ADDRESS:PORT`` (an IPv6 address in brackets).

    Raises:
        ValueError: it is not of that form.
    """
    host, _, port = listen.rpartition(":")
    address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    number = int(port)
    if not 0 <= number <= 65_535:  # noqa: PLR2004 -- the range of a TCP port
        raise ValueError(f"port {number} is out of range")
    return str(address), number
