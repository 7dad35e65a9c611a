"""From a table of routes to a server: who asks, whether it may, how large a body may be, how an error is answered.

Rules:

1. An operator's route names its action, and is authorized before its body is read, and again when it is there.
2. A refusal is ``{"error", "check"}`` with the status that fits its blame, never a traceback; one that speaks of a node or of a right is in the
   audit log; of callers that have proven nothing within the limits of :mod:`controller.api.refusals`.
3. Every answer is counted by its route and status, a call of a node that joins by the check that refused it, too.
4. Who calls too often is refused before a body is read. A body is read up to the route's limit and within :data:`BODY_TIMEOUT_S`; compressed bodies are not taken.
5. A refusal's record names the node that the body speaks of, also where the body is refused for what else stands in it; it is the peer's word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import structlog
from aiohttp import web

from agent import clock
from agent.attest.enrolment import ENROL_PATH, NodeId
from agent.errors import ConfigError, EdgeWardenError, HostError, PeerError, PolicyError, VerificationError
from agent.records import Principal
from controller.api.refusals import Refusals
from controller.metrics import Figures
from controller.store import admins, audit
from controller.store.database import Database, StoreError
from controller.trust.authorize import Authorizer
from controller.trust.node_tls import certificate_spki

__all__ = ["BODY_TIMEOUT_S", "TEXT", "Call", "Route", "Surface", "number"]

BODY_TIMEOUT_S = 30.0
MAX_BODY_BYTES = 1 << 20  # where a route says nothing
_READ_BYTES = 256 * 1024
_NODE = web.RequestKey("node", str)
_CHECK = web.RequestKey("check", str)
_ENROLMENT_STEPS = {ENROL_PATH: "begin", ENROL_PATH + "/{enrolment}": "complete"}
_log = structlog.get_logger(__name__)

TokenReader: TypeAlias = Callable[[str], Awaitable[Principal]]


@dataclass(frozen=True, slots=True)
class Call:
    """One request that may go on.

    Attributes:
        principal: who asks; None on routes for nodes.
        body: decoded, of the route's type.
        peer_spki_sha256: key of the client certificate, where there is one.
        source: address of the peer.
    """

    request: web.Request
    principal: Principal | None
    body: Any
    peer_spki_sha256: str | None
    source: str

    @property
    def by(self) -> str:
        """Who asks, for the audit log."""
        return self.principal.id if self.principal else f"peer/{self.source}"

    def concerns(self, node: str) -> None:
        """Name the node in the record of a refusal, where neither path nor body do."""
        self.request[_NODE] = node

    def text(self, name: str, default: str = "") -> str:
        """Return a query parameter."""
        return self.request.query.get(name, default)

    def number(self, name: str, default: int, most: int) -> int:
        """Return a query parameter as a number.

        Raises:
            PeerError: 400.
        """
        value = self.request.query.get(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and len(value) <= len(str(most)) and int(value) <= most):
            raise PeerError(400, "query", f"{name}: a number from 0 to {most}")
        return int(value)


TEXT: Mapping[str, Any] = {"type": "string"}  # of a query parameter


def number(most: int) -> Mapping[str, Any]:
    """Return the JSON Schema of what :meth:`Call.number` takes."""
    return {"type": "integer", "minimum": 0, "maximum": most}


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table.

    Attributes:
        action: what an operator must be allowed; None: for nodes or for everybody.
        body, answer: types of the documents, None for none.
        kind: of the audit record when it is refused; empty: refusals are not recorded.
        query: JSON Schemas of its query parameters, none of which is demanded.
        refusals: statuses besides those that follow from the fields above.
        admit: raises where too many calls come, by the peer's address and the key of its certificate; asked before a body is read.
    """

    method: str
    path: str
    summary: str
    handler: Callable[[Call], Awaitable[Any]]
    action: str | None = None
    body: type[Any] | None = None
    answer: Any = None
    limit_bytes: int = MAX_BODY_BYTES
    status: int = 200
    kind: str = ""
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    admit: Callable[[str, str | None], None] | None = None


class _Named(msgspec.Struct):
    """What any body may say: of which node it speaks."""

    node: NodeId = ""


class Surface:
    """Makes handlers of routes.

    Args:
        database: where admins are looked up and refusals recorded.
        authorizer: decides what an operator may do.
        tokens: reads bearer tokens, where they are taken.
        figures: where answers are counted.
        refusals: decides which are recorded.
    """

    def __init__(
        self,
        database: Database,
        authorizer: Authorizer,
        tokens: TokenReader | None,
        figures: Figures,
        refusals: Refusals,
    ) -> None:
        self._database = database
        self._authorizer = authorizer
        self._tokens = tokens
        self._figures = figures
        self._refusals = refusals

    def application(self, routes: list[Route]) -> web.Application:
        """Return the server of a table."""
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        for route in routes:
            application.router.add_route(route.method, route.path, self._handler(route))
        application.middlewares.extend((self._count, _http_errors))
        return application

    @web.middleware
    async def _count(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        status = 500  # what the server answers to a programming error
        try:
            answer = await handler(request)
            status = answer.status
        finally:
            resource = request.match_info.route.resource
            path = resource.canonical if resource is not None else "none"
            # What a peer may write as a method is not ours; of a route it is.
            self._figures.calls.add(request.method if resource is not None else "none", path, str(status))
            if path in _ENROLMENT_STEPS:
                outcome = "ok" if status < 300 else "refused" if status < 500 else "failed"  # noqa: PLR2004 -- HTTP's classes
                self._figures.enrolments.add(_ENROLMENT_STEPS[path], outcome, request.get(_CHECK, ""))
        return answer

    def _handler(self, route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            principal: Principal | None = None
            spki = _peer_spki(request)
            source = request.remote or ""
            try:
                if route.action is not None:
                    principal = await self._identify(request, spki)
                    self._authorizer.require(principal, route.action)
                if route.admit is not None:
                    route.admit(source, spki)
                _check_text(request)
                body = await _body(request, route)
                if route.action is not None and route.body is not None:
                    # A body may take its time, and its sender's right may be gone by then.
                    principal = await self._identify(request, spki)
                    self._authorizer.require(principal, route.action)
                answer = await route.handler(Call(request, principal, body, spki, source))
            except EdgeWardenError as error:
                check = request[_CHECK] = _check_of(error)
                if principal is not None or self._refusals.has_record(source, check):
                    await self._record(route, request, principal.id if principal else f"peer/{source}", error)
                return _refusal(error)
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.Response(body=msgspec.json.encode(answer), content_type="application/json", status=route.status)

        return handle

    async def _identify(self, request: web.Request, spki: str | None) -> Principal:
        """A client certificate of the controller's CA, or a token where that is configured."""
        authorization = request.headers.get("Authorization")
        if authorization is not None and self._tokens is not None:
            return await self._tokens(authorization)
        if spki is None:
            raise PeerError(401, "no_certificate", "a client certificate of this controller's CA is needed")
        async with self._database.begin() as connection:
            found = await admins.role_of(connection, spki, clock.now_us())
        if found is None:
            raise PeerError(403, "no_admin", "the certificate is no admin's, or it was revoked")
        name, role = found
        return Principal(id=f"admin/{name}", kind="mtls", roles=(role,))

    async def _record(self, route: Route, request: web.Request, who: str, error: EdgeWardenError) -> None:
        check = _check_of(error)
        _log.warning("call_refused", path=request.path, principal=who, check=check, error=str(error))
        if isinstance(error, StoreError) or not (route.action or route.kind):
            return
        entry = audit.AuditEntry(
            kind=route.kind or route.action or "",
            principal=who,
            outcome="denied" if isinstance(error, PeerError) and error.status in {401, 403} else "refused",
            node=str(request.match_info.get("node") or request.get(_NODE, "")),
            check=check,
            words=str(error),
        )
        try:
            async with self._database.begin() as connection:
                await audit.append(connection, entry)
        except StoreError as failure:
            _log.error("refusal_not_recorded", error=str(failure))


def _check_text(request: web.Request) -> None:
    """Refuse what no name holds and not every database takes.

    Raises:
        PeerError: 400.
    """
    for value in (*request.match_info.values(), *request.query.values()):
        if not value.isprintable():
            raise PeerError(400, "text", "a path or a query parameter holds a character that can't be printed")


async def _body(request: web.Request, route: Route) -> Any:  # noqa: ANN401 -- of the route's type
    if route.body is None:
        return None
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise PeerError(415, "encoding", "send the body without compression")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.content.iter_chunked(_READ_BYTES):
                size += len(part)
                if size > route.limit_bytes:
                    raise PeerError(413, "too_large", f"the body is over {route.limit_bytes} bytes")
                parts.append(part)
    except TimeoutError:
        raise PeerError(408, "slow_body", f"the body did not come within {BODY_TIMEOUT_S} s") from None
    whole = b"".join(parts)
    # A RecursionError is what the decoder makes of brackets in brackets: the sender's doing, like any other malformed text.
    try:
        request[_NODE] = msgspec.json.decode(whole, type=_Named).node
    except (ValueError, RecursionError):
        request[_NODE] = ""  # it names no node, or is refused as a whole by what follows
    try:
        return msgspec.json.decode(whole, type=route.body)
    except (ValueError, RecursionError) as error:
        raise PeerError(400, "encoding", f"the body is not what this call takes: {error}") from error


def _peer_spki(request: web.Request) -> str | None:
    tls = request.transport.get_extra_info("ssl_object") if request.transport else None
    der = tls.getpeercert(binary_form=True) if tls is not None else None
    return certificate_spki(der) or None if der is not None else None


def _check_of(error: EdgeWardenError) -> str:
    match error:
        case VerificationError():
            return error.check
        case PeerError():
            return error.reason
        case _:
            return ""


def _status_of(error: EdgeWardenError) -> int:
    match error:
        case PeerError():
            return error.status
        case VerificationError() | PolicyError() | ConfigError():
            return 422
        case HostError():
            return 503
        case _:
            return 502


def _refusal(error: EdgeWardenError) -> web.Response:
    headers = {}
    if isinstance(error, PeerError) and error.retry_after_s is not None:
        headers["Retry-After"] = str(int(error.retry_after_s) + 1)
    words = str(error)
    if isinstance(error, StoreError):
        words = "the controller's database does not answer: come again"
    elif isinstance(error, HostError):  # paths and addresses of its own are for its log
        words = "the controller can't do its part now: its log says why"
    return web.json_response({"error": words, "check": _check_of(error)}, status=_status_of(error), headers=headers)


@web.middleware
async def _http_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason or "refused", "check": ""}, status=error.status)
