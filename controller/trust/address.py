"""Where a node says that it can be polled: its own word, which decides where the controller opens connections.

Rules:

1. An address is a host and a port, and nothing besides: whoever names it must choose neither the path nor the user of a request in the controller's name.
2. A host is a name, an IPv4 address in four decimal numbers, or an IPv6 address in brackets.
3. Addresses at which no node can be, but something of the controller's own machine or cloud may (link-local, and so instance metadata; multicast;
   unspecified), are refused. Private and loopback addresses are not: fleets live there. A name can come to mean any address; what a connection gives
   away there is bounded by what follows: TLS from the first byte, one fixed path, no redirection, and nothing of the answer is shown but its status.
"""

from __future__ import annotations

import ipaddress
import re

from agent.errors import VerificationError

__all__ = ["check_address"]

MAX_PORT = 65_535
_FORM = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]{2,45})\]|(?P<name>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9.])?)):(?P<port>[0-9]{1,5})"
)
_NUMERIC = re.compile(r"(?:[0-9.]+|(?:0[xX][0-9a-fA-F]*|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]*|[0-9]+))*\.?)")


def check_address(mode: str, address: str | None) -> None:
    """Return when a node that enrols in this mode can be reached, as far as its address tells.

    Raises:
        VerificationError: ``address``.
    """
    if address is None:
        if mode == "pull":
            raise VerificationError("address", "a node that is to be polled names its address")
        return
    parts = _FORM.fullmatch(address)
    if parts is None or int(parts["port"]) > MAX_PORT:
        raise VerificationError("address", "not HOST:PORT")
    host = parts["v6"] or parts["name"]
    if parts["v6"] is None and not _NUMERIC.fullmatch(host):
        return  # a name
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise VerificationError("address", "a host of numbers alone is an IPv4 address in its usual form") from None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        raise VerificationError("address", f"no node is at {host}")
