"""What the agent offers to its operator (a Unix socket) and to controllers (mTLS), and how it answers.

Rules:

1. The peer of the Unix socket is who the kernel says (``SO_PEERCRED``): root and the agent's own user have the role ``admin``, anyone else none.
2. Every administrative call is authorized by the policy as ``admin.<verb>`` and recorded, before it takes effect.
3. Evidence goes to whoever may reach the surface: it proves, and reveals nothing that grants a right. Its nonce is the caller's.
4. An error is ``{"error": "…"}`` with the status that fits its blame; never a traceback.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import structlog
from aiohttp import web

from agent.errors import ConfigError, EdgeWardenError, HostError, PeerError, PolicyError, VerificationError
from agent.records import JsonValue, Principal

__all__ = ["MAX_BUNDLE_BYTES", "NodeControl", "admin_application", "evidence_application", "unix_principal"]

MAX_BUNDLE_BYTES: Final = 32 << 20
NONCE_HEX_DIGITS: Final = 64
_UCRED = struct.Struct("3i")
_log = structlog.get_logger(__name__)


class NodeControl(Protocol):
    """What the daemon offers behind both surfaces."""

    async def authorize_admin(self, principal: Principal, verb: str) -> None:
        """Raise ``PeerError`` 403 unless the policy allows ``admin.<verb>``; records the decision."""

    async def evidence(self, nonce: bytes, from_index: int, peer_spki_sha256: str | None) -> bytes:
        """Return Evidence as JSON."""

    async def ak_public(self) -> bytes:
        """Return the attestation key as TPMT_PUBLIC."""

    def status(self) -> dict[str, JsonValue]:
        """Return everything an operator asks for first."""

    async def activate_policy(self, bundle: bytes, principal: Principal) -> dict[str, JsonValue]:
        """Activate a bundle, or raise and leave the old one in force."""

    async def rescan_models(self, principal: Principal) -> dict[str, JsonValue]:
        """Bring what is loaded in line with the store."""


def unix_principal(request: web.Request) -> Principal:
    """Return who is at the other end of a Unix socket.

    Raises:
        PeerError: 401, when the transport has no peer credentials.
    """
    sock = request.transport.get_extra_info("socket") if request.transport else None
    if sock is None or sock.family != socket.AF_UNIX:
        raise PeerError(401, "no_peer", "this surface is served on a Unix socket only")
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    roles = ("admin",) if uid in {0, os.getuid()} else ()
    return Principal(id=f"uid:{uid}", kind="unix", roles=roles)


def admin_application(control: NodeControl) -> web.Application:
    """Serve the operator's calls and Evidence."""

    async def status(request: web.Request) -> web.Response:
        await control.authorize_admin(unix_principal(request), "status")
        return web.json_response(control.status())

    async def show_policy(request: web.Request) -> web.Response:
        await control.authorize_admin(unix_principal(request), "status")
        return web.json_response(control.status()["policy"])

    async def activate_policy(request: web.Request) -> web.Response:
        principal = unix_principal(request)
        await control.authorize_admin(principal, "policy.activate")
        return web.json_response(await control.activate_policy(await request.read(), principal))

    async def rescan(request: web.Request) -> web.Response:
        principal = unix_principal(request)
        await control.authorize_admin(principal, "model.rescan")
        return web.json_response(await control.rescan_models(principal))

    application = web.Application(client_max_size=MAX_BUNDLE_BYTES, middlewares=[_errors])
    application.add_routes(
        [
            web.get("/admin/v1/status", status),
            web.get("/admin/v1/policy", show_policy),
            web.put("/admin/v1/policy", activate_policy),
            web.post("/admin/v1/models/rescan", rescan),
            *_evidence_routes(control, lambda _: None),
        ]
    )
    return application


def evidence_application(control: NodeControl, spki_sha256: str) -> web.Application:
    """Serve controllers, whose certificates the TLS library has verified; ``spki_sha256`` is this listener's own key."""
    application = web.Application(client_max_size=1024, middlewares=[_errors])
    application.add_routes(_evidence_routes(control, lambda _: spki_sha256))
    return application


def _evidence_routes(control: NodeControl, spki: Callable[[web.Request], str | None]) -> list[web.AbstractRouteDef]:
    async def evidence(request: web.Request) -> web.Response:
        nonce = request.query.get("nonce", "")
        start = request.query.get("from", "0")
        if len(nonce) != NONCE_HEX_DIGITS or not all(digit in "0123456789abcdef" for digit in nonce):
            raise PeerError(400, "nonce", "nonce: 64 lower-case hexadecimal digits (32 bytes) are required")
        if not (start.isascii() and start.isdigit() and len(start) <= 9):  # noqa: PLR2004 -- below 10**9
            raise PeerError(400, "from", "from: the index of the first wanted log entry, a number below 10**9")
        body = await control.evidence(bytes.fromhex(nonce), int(start), spki(request))
        return web.Response(body=body, content_type="application/json")

    async def ak(_: web.Request) -> web.Response:
        return web.json_response({"ak_public": base64.b64encode(await control.ak_public()).decode()})

    return [web.get("/attestation/v1/evidence", evidence), web.get("/attestation/v1/ak", ak)]


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except EdgeWardenError as error:
        status = _status_of(error)
        _log.warning("control_call_refused", path=request.path, status=status, error=str(error))
        return _refusal(status, str(error))
    except web.HTTPException as error:
        return _refusal(error.status, error.reason or "refused")


def _status_of(error: EdgeWardenError) -> int:
    match error:
        case PeerError():
            return error.status
        case VerificationError() | PolicyError() | ConfigError():
            return 422
        case HostError():
            return 503
        case _:
            return 500


def _refusal(status: int, words: str) -> web.Response:
    body: dict[str, Any] = {"error": words}
    return web.json_response(body, status=status)
