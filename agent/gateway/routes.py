"""The Open Inference Protocol's REST calls: from a path to a flow, from a flow to an answer.

Rules:

1. Only the paths of ``_MODEL``, ``_REFUSED`` and ``_SERVER_PATHS`` exist; every other path is 404, every other method 405.
2. What would change the server from the outside (shared memory, uploads, trace and log settings) is refused with 4xx. Every refusal is
   recorded, with who asked where that is known.
3. A body with a content coding is 415: nothing is decompressed.
4. Errors are ``{"error": "…"}``; an answer carries its decision id, the salt of its digests and its latency split in headers.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from agent import __version__
from agent.errors import PeerError
from agent.flows.request import Answer, Caller, RequestFlow
from agent.gateway import oip
from agent.gateway.connections import Front, source_address
from agent.inference.registry import LoadedModel
from agent.inference.tensors import InferRequest, InferResponse

__all__ = ["DECISION_HEADER", "SALT_HEADER", "Routes"]

DECISION_HEADER: Final = "EdgeWarden-Decision-Id"
SALT_HEADER: Final = "EdgeWarden-Salt"
MAX_PATH_CHARS: Final = 512
MAX_RECORDED_CALL_CHARS: Final = 200
_MODEL = re.compile(
    r"/v2/models/(?P<model>[A-Za-z0-9][A-Za-z0-9._-]{0,127})(?:/versions/(?P<version>[A-Za-z0-9][A-Za-z0-9._+-]{0,63}))?"
    r"(?:/(?P<verb>infer|ready|generate|config|stats|trace/setting))?",
    re.ASCII,
)
_REFUSED = re.compile(
    r"/v2/(systemsharedmemory|cudasharedmemory|tpusharedmemory|repository|trace|logging)(/.*)?", re.ASCII
)

_SERVER_PATHS: Final = frozenset({"/v2", "/v2/", "/v2/health/live", "/v2/health/ready"})


@dataclass(slots=True)
class _HttpWire:
    """A request's body, read within its size and its time."""

    request: web.BaseRequest
    limits: oip.WireLimits
    timeout_s: float

    @property
    def announced_bytes(self) -> int | None:
        return self.request.content_length

    async def read(self, max_bytes: int) -> bytes:
        content = self.request.content
        if content.is_eof() and not content.total_bytes:
            return b""
        if self.request.headers.get("Expect", "").lower() == "100-continue":
            # The client waits for this word before it sends: whoever is refused before sends nothing.
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The whole body often came with the headers: then no timer is worth its cost.
        body = content.read_nowait() if self._complete() else await self._read_slowly(max_bytes)
        if len(body) > max_bytes:
            raise PeerError(413, "body_too_large", f"body: more than {max_bytes} bytes")
        return body

    def _complete(self) -> bool:
        length = self.request.content_length
        return length is not None and self.request.content.total_bytes == length and self.request.content.is_eof()

    async def _read_slowly(self, max_bytes: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.timeout_s):
                async for part in self.request.content.iter_any():
                    size += len(part)
                    if size > max_bytes:
                        break
                    parts.append(part)
                else:
                    return b"".join(parts)
        except TimeoutError as error:
            raise PeerError(408, "body_timeout", f"the body was not complete after {self.timeout_s:g} s") from error
        except (web.RequestPayloadError, ConnectionError) as error:
            raise PeerError(400, "body_cut_short", "the body ended before its announced length") from error
        raise PeerError(413, "body_too_large", f"body: more than {max_bytes} bytes")

    def decode(self, body: bytes, model: LoadedModel) -> InferRequest:
        headers = self.request.headers
        oip.check_content_type(headers.get("Content-Type"))
        if headers.get("Content-Encoding", "identity") != "identity":
            raise PeerError(415, "content_encoding", "a body with a Content-Encoding is not accepted")
        length = oip.parse_header_length(headers.get(oip.HEADER_LENGTH))
        return oip.parse_infer_request(body, length, limits=self.limits, allow_nonfinite=model.manifest.allow_nonfinite)

    def encode(self, request: InferRequest, response: InferResponse) -> tuple[bytes, int | None]:
        return oip.encode_infer_response(response, request)


class Routes:
    """Handles the requests of one gateway.

    Args:
        flow: answers inference.
        limits: of the wire format.
        body_timeout_s: time for a body.
        max_concurrent: requests in work at a time; one more gets 503.
    """

    def __init__(self, flow: RequestFlow, limits: oip.WireLimits, body_timeout_s: float, max_concurrent: int) -> None:
        self._flow = flow
        self._limits = limits
        self._body_timeout_s = body_timeout_s
        self._max_concurrent = max_concurrent
        self.front: Front | None = None
        self.draining = False
        self.in_work = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request."""
        if self.front is not None:
            self.front.request_began(request.protocol)
        self.in_work += 1
        self.idle.clear()
        try:
            if self.in_work > self._max_concurrent:
                busy = PeerError(503, "busy", "too many requests are in work", retry_after_s=1.0)
                response = await self._refuse(request, busy)
            else:
                response = await self._dispatch(request)
        except PeerError as error:
            response = _refusal(error)
        finally:
            self.in_work -= 1
            if not self.in_work:
                self.idle.set()
        response.headers["Server"] = "edgewarden"
        if self.draining or (response.status >= 400 and not request.content.is_eof()):  # noqa: PLR2004 -- errors
            # What is left of a refused body is not read: the connection ends with the answer.
            response.force_close()
        return response

    async def _dispatch(self, request: web.BaseRequest) -> web.Response:
        path = request.rel_url.path
        match = _MODEL.fullmatch(path) if len(path) <= MAX_PATH_CHARS else None
        if match is None:
            return await self._server(request, path)
        model, version, verb = match["model"], match["version"] or "", match["verb"]
        if verb == "infer":
            return await self._infer(request, model, version)
        if verb not in {None, "ready"}:
            return await self._refuse(request, PeerError(403, "surface", "not served here"))
        return await self._model(request, model, version, verb)

    async def _infer(self, request: web.BaseRequest, model: str, version: str) -> web.Response:
        if request.method != "POST":
            return await self._refuse(request, _method("POST"))
        wire = _HttpWire(request, self._limits, self._body_timeout_s)
        answer = await self._flow.infer(_caller(request), model, version, wire)
        return web.Response(body=answer.body, headers=_headers(answer))

    async def _model(self, request: web.BaseRequest, model: str, version: str, verb: str | None) -> web.Response:
        if request.method != "GET":
            return await self._refuse(request, _method("GET"))
        loaded = await self._flow.metadata(_caller(request), model, version)
        if verb == "ready" or loaded is None:
            return web.Response(status=200)
        manifest = loaded.manifest
        versions = self._flow.registry.versions(manifest.name)
        return _json(oip.model_metadata(manifest.name, versions, manifest.inputs, manifest.outputs))

    async def _server(self, request: web.BaseRequest, path: str) -> web.Response:
        if _REFUSED.fullmatch(path):
            words = "shared memory, repository, trace and log settings can't be used from outside"
            return await self._refuse(request, PeerError(403, "surface", words))
        if path not in _SERVER_PATHS:
            return await self._refuse(request, PeerError(404, "path", "no such path"))
        if request.method != "GET":
            return await self._refuse(request, _method("GET"))
        if path == "/v2/health/live":
            return web.Response(status=200)
        if path == "/v2/health/ready":
            return web.Response(status=200 if self._flow.registry.ready and not self.draining else 503)
        await self._flow.metadata(_caller(request))
        return _json(oip.server_metadata("edgewarden", __version__))

    async def _refuse(self, request: web.BaseRequest, error: PeerError) -> web.Response:
        """Answer, and record, what no flow looks at."""
        call = ascii(f"{request.method} {request.rel_url.path}"[:MAX_RECORDED_CALL_CHARS])[1:-1]
        return _refusal(await self._flow.refuse(_caller(request), call, error))


def _method(allowed: str) -> PeerError:
    return PeerError(405, "method", f"{allowed} is the only method here")


def _caller(request: web.BaseRequest) -> Caller:
    transport = request.transport
    if transport is None:
        raise PeerError(400, "gone", "the connection has ended")
    tls = transport.get_extra_info("ssl_object")
    return Caller(
        certificate=tls.getpeercert(binary_form=True) if tls else None,
        authorization=request.headers.get("Authorization"),
        source_ip=source_address(transport),
    )


def _headers(answer: Answer) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json" if answer.header_length is None else "application/octet-stream",
        DECISION_HEADER: answer.decision_id,
        SALT_HEADER: answer.salt.hex(),
        "Server-Timing": ", ".join([f"{stage};dur={micros / 1000:g}" for stage, micros in answer.latency_us.items()]),
    }
    if answer.header_length is not None:
        headers[oip.HEADER_LENGTH] = str(answer.header_length)
    return headers


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _refusal(error: PeerError) -> web.Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(max(1, round(error.retry_after_s)))}
    if error.status == 401:  # noqa: PLR2004 -- RFC 9110: a 401 names its scheme
        headers["WWW-Authenticate"] = "Bearer"
    body = oip.encode_error(str(error))
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)
