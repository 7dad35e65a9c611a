"""What the node offers to Keylime's verifier and tenant, API 2.5.

Rules:

1. The peer holds a certificate of the verifier's CA; the TLS library has verified it before anything here is reached.
2. A parameter that is missing, unknown, repeated or out of its form is 400; a path that is none of these is 404.
3. Another version of the API is 400 with the words that make Keylime ask for the versions again.
4. What the node itself fails at is 500: Keylime asks again some times. To any other status it gives the node up for good.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

import structlog
from aiohttp import web

from agent.errors import EdgeWardenError, PeerError, VerificationError
from agent.flows.keylime import API_VERSION, KeylimePeer
from agent.records import JsonValue

__all__ = ["MAX_NOTIFICATION_BYTES", "KeylimeControl", "keylime_application"]

MAX_NOTIFICATION_BYTES: Final = 256 * 1024
_FORMS: Final[Mapping[str, re.Pattern[str]]] = {
    "nonce": re.compile(r"[A-Za-z0-9]{1,64}"),
    "mask": re.compile(r"0x[0-9A-Fa-f]{1,6}"),  # 24 PCRs
    "partial": re.compile(r"[01]"),
    "ima_ml_entry": re.compile(r"[0-9]{1,9}"),
}
_log = structlog.get_logger(__name__)


class KeylimeControl(Protocol):
    """What the flow offers behind this surface."""

    async def identity(self, nonce: str, peer: KeylimePeer) -> dict[str, JsonValue]:
        """Return a quote that binds the listener's key."""

    async def integrity(
        self, nonce: str, pcrs: frozenset[int], start: int, peer: KeylimePeer, *, with_key: bool
    ) -> dict[str, JsonValue]:
        """Return a quote of PCRs, with the measurement list from ``start`` on."""

    async def revocation(self, body: bytes, peer: KeylimePeer) -> None:
        """Take a verifier's word about a node that failed."""


def keylime_application(control: KeylimeControl) -> web.Application:
    """Serve a verifier and its tenant."""

    async def version(_: web.Request) -> web.Response:
        return _answer({"supported_versions": [API_VERSION]})

    async def identity(request: web.Request) -> web.Response:
        _check_version(request)
        query = _query(request, "nonce")
        return _answer(await control.identity(query["nonce"], _peer(request)))

    async def integrity(request: web.Request) -> web.Response:
        _check_version(request)
        query = _query(request, "nonce", "mask", "partial", "ima_ml_entry")
        mask = int(query["mask"], 16)
        pcrs = frozenset(index for index in range(mask.bit_length()) if mask >> index & 1)
        start, with_key = int(query["ima_ml_entry"]), query["partial"] == "0"
        return _answer(await control.integrity(query["nonce"], pcrs, start, _peer(request), with_key=with_key))

    async def revocation(request: web.Request) -> web.Response:
        _check_version(request)
        try:
            await control.revocation(await request.read(), _peer(request))
        except VerificationError as error:
            raise PeerError(400, "notification", str(error)) from error
        return _answer({})

    application = web.Application(client_max_size=MAX_NOTIFICATION_BYTES, middlewares=[_errors])
    application.add_routes(
        [
            web.get("/version", version),
            web.get("/v{version}/quotes/identity", identity),
            web.get("/v{version}/quotes/integrity", integrity),
            web.post("/v{version}/notifications/revocation", revocation),
        ]
    )
    return application


def _check_version(request: web.Request) -> None:
    if request.match_info["version"] != API_VERSION:
        raise PeerError(400, "version", "API version not supported")


def _query(request: web.Request, *names: str) -> dict[str, str]:
    """Return the query's values, each exactly once and in its form.

    Raises:
        PeerError: 400.
    """
    if sorted(name for name, _ in request.query.items()) != sorted(names):  # its keys alone would hide what is repeated
        raise PeerError(400, "query", f"the parameters are {', '.join(names)}, each once")
    for name in names:
        if not _FORMS[name].fullmatch(request.query[name]):
            raise PeerError(400, name, f"{name}: does not match {_FORMS[name].pattern}")
    return {name: request.query[name] for name in names}


def _peer(request: web.Request) -> KeylimePeer:
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    subject = dict(pair for part in (certificate or {}).get("subject", ()) for pair in part)
    return KeylimePeer(subject.get("commonName", ""), request.remote or "")


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except EdgeWardenError as error:
        status = error.status if isinstance(error, PeerError) else 500
        _log.warning("keylime_call_refused", path=request.path, status=status, error=str(error))
        return _refusal(status, str(error))
    except web.HTTPException as error:
        return _refusal(error.status, error.reason or "refused")


def _answer(results: dict[str, JsonValue]) -> web.Response:
    return web.json_response({"code": 200, "status": "Success", "results": results})


def _refusal(status: int, words: str) -> web.Response:
    return web.json_response({"code": status, "status": words, "results": {}}, status=status)
