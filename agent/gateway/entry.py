"""The gateway process from its birth: key material, sandbox, event loop, accept.

Rules:

1. The inference key is loaded from its sealed descriptor before the sandbox; after that nothing can be opened any more.
2. TLS 1.3 only. A client certificate is demanded, or, where tokens are accepted, asked for.
3. No byte of a client or of a model is touched before the sandbox holds.
"""

from __future__ import annotations

import gc
import os
import socket
import ssl

import msgspec
import uvloop

from agent.gateway.service import Gateway
from agent.identity.token import TokenVerifier
from agent.isolation.child import Child
from agent.isolation.memfd import map_sealed
from agent.messages import GatewayStart

__all__ = ["main"]

# A request's objects go with their last reference, and looking for others so often would cost each request a twentieth. What connections
# leave behind is collected by the front.
GC_THRESHOLDS = (5_000, 10, 10)


def main(child: Child) -> None:
    """Run a gateway; the entry that the zygote calls."""
    start = msgspec.convert(child.args, GatewayStart)
    context = _tls(child.fds, tokens=start.tokens is not None)
    tokens = None
    if start.tokens is not None:
        tokens = TokenVerifier(
            bytes(map_sealed(child.fds["jwks"])),
            audience=start.tokens.audience,
            issuer=start.tokens.issuer,
            roles_claim=start.tokens.roles_claim,
        )
    listener = socket.socket(fileno=child.fds["listener"])
    for name in ("certificate", "key", "client_ca", "jwks"):
        if name in child.fds:
            os.close(child.fds[name])
    gc.set_threshold(*GC_THRESHOLDS)
    child.enter_sandbox()
    # After the sandbox: libuv would set up an io_uring before it, and could not use it inside.
    loop = uvloop.new_event_loop()
    gateway = Gateway(child.channel, listener, start, context, tokens)
    loop.run_until_complete(gateway.run())


def _tls(fds: dict[str, int], *, tokens: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(f"/proc/self/fd/{fds['certificate']}", f"/proc/self/fd/{fds['key']}")
    context.load_verify_locations(f"/proc/self/fd/{fds['client_ca']}")
    context.verify_mode = ssl.CERT_OPTIONAL if tokens else ssl.CERT_REQUIRED
    context.set_alpn_protocols(["http/1.1"])
    return context
