"""What the agent offers to its operator (a Unix socket) and to controllers (mTLS), and how it answers.

Rules:

1. The peer of the Unix socket is who the kernel says (``SO_PEERCRED``): root and the agent's own user have the role ``admin``, anyone else none.
2. Every administrative call is authorized by the policy as ``admin.<verb>`` and recorded, before it takes effect.
3. On the listener of an enrolled node only the controller is answered, by the SPIFFE ID of its certificate. Elsewhere Evidence goes to whoever may reach the surface: it proves, and reveals nothing that grants a right. Its nonce is the caller's.
4. A join token stands in no answer and no log.
5. An error is ``{"error": "…"}`` with the status that fits its blame; never a traceback.
"""

from __future__ import annotations

import base64
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware

from agent.attest.enrolment import RESULT_PATH
from agent.attest.result import MAX_RESULT_BYTES
from agent.errors import (
    ConfigError,
    ControllerError,
    EdgeWardenError,
    HostError,
    PeerError,
    PolicyError,
    VerificationError,
)
from agent.flows.enrolment import EnrolOrder
from agent.identity.peer import PeerVerifier
from agent.records import JsonValue, Principal

__all__ = ["MAX_BUNDLE_BYTES", "NodeControl", "admin_application", "evidence_application", "unix_principal"]

MAX_BUNDLE_BYTES: Final = 32 << 20
NONCE_HEX_DIGITS: Final = 64
MAX_ORDER_BYTES: Final = 8 * 1024
Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_UCRED = struct.Struct("3i")
_log = structlog.get_logger(__name__)


class NodeControl(Protocol):
    """What the daemon offers behind both surfaces."""

    async def authorize_admin(self, principal: Principal, verb: str) -> None:
        """Raise ``PeerError`` 403 unless the policy allows ``admin.<verb>``; records the decision."""

    def enrolment(self) -> dict[str, JsonValue]:
        """Return where the node is enrolled, and what its controller thinks of it."""

    async def enrol(self, order: EnrolOrder, principal: Principal) -> dict[str, JsonValue]:
        """Enrol the node, which must not be enrolled."""

    async def leave(self, principal: Principal) -> dict[str, JsonValue]:
        """Forget the enrolment."""

    async def take_result(self, jwt: str) -> None:
        """Take an Attestation Result of the controller's, or raise."""

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

    async def enrolment(request: web.Request) -> web.Response:
        await control.authorize_admin(unix_principal(request), "status")
        return web.json_response(control.enrolment())

    async def enrol(request: web.Request) -> web.Response:
        principal = unix_principal(request)
        await control.authorize_admin(principal, "enrol")
        return web.json_response(await control.enrol(_order(await request.read()), principal))

    async def leave(request: web.Request) -> web.Response:
        principal = unix_principal(request)
        await control.authorize_admin(principal, "leave")
        return web.json_response(await control.leave(principal))

    application = web.Application(client_max_size=MAX_BUNDLE_BYTES, middlewares=[_errors])
    application.add_routes(
        [
            web.get("/admin/v1/status", status),
            web.get("/admin/v1/policy", show_policy),
            web.put("/admin/v1/policy", activate_policy),
            web.post("/admin/v1/models/rescan", rescan),
            web.get("/admin/v1/enrolment", enrolment),
            web.delete("/admin/v1/enrolment", leave),
            web.post("/admin/v1/enrol", enrol),
            *_evidence_routes(control, lambda _: None),
        ]
    )
    return application


def evidence_application(control: NodeControl, spki_sha256: str, controller_id: str | None = None) -> web.Application:
    """Serve controllers, whose certificates the TLS library has verified.

    Args:
        control: what is behind it.
        spki_sha256: of this listener's own key.
        controller_id: SPIFFE ID of the one controller, which may then also leave its Attestation Results; None where whoever has a certificate
            of the CA may ask for Evidence.
    """
    routes = _evidence_routes(control, lambda _: spki_sha256)
    if controller_id is None:
        application = web.Application(client_max_size=1024, middlewares=[_errors])
    else:
        application = web.Application(
            client_max_size=MAX_RESULT_BYTES + 1, middlewares=[_errors, _only_for(controller_id)]
        )
        routes.append(web.put(RESULT_PATH, _result_taker(control)))
    application.add_routes(routes)
    return application


def _only_for(controller_id: str) -> Middleware:
    peers = PeerVerifier()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        tls = request.transport.get_extra_info("ssl_object") if request.transport else None
        certificate = tls.getpeercert(binary_form=True) if tls else None
        if certificate is None:
            raise PeerError(401, "no_identity", "a client certificate is required")
        principal = peers.principal(certificate)
        if (principal.kind, principal.id) != ("spiffe", controller_id):
            raise PeerError(403, "not_the_controller", f"{principal.id} is not the controller of this node")
        return await handler(request)

    return check


def _result_taker(control: NodeControl) -> Handler:
    async def put_result(request: web.Request) -> web.Response:
        try:
            jwt = (await request.read()).decode("ascii")
        except UnicodeDecodeError as error:
            raise PeerError(400, "encoding", "an Attestation Result is a JWT, in ASCII") from error
        await control.take_result(jwt.strip())
        return web.json_response({"taken": True})

    return put_result


def _order(body: bytes) -> EnrolOrder:
    if len(body) > MAX_ORDER_BYTES:
        raise PeerError(413, "too_large", f"an order to enrol has at most {MAX_ORDER_BYTES} bytes")
    try:
        return msgspec.json.decode(body, type=EnrolOrder)
    except ValueError:
        # Without its cause: that could hold a part of the token.
        raise PeerError(400, "order", "an order to enrol has token, mode and address, in JSON") from None


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
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
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
        case ControllerError():
            return 502
        case HostError():
            return 503
        case _:
            return 500


def _refusal(status: int, words: str) -> web.Response:
    body: dict[str, Any] = {"error": words}
    return web.json_response(body, status=status)
