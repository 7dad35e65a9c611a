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
import functools
import re
from typing import Final

from agent import __version__
from agent.errors import PeerError
from agent.flows.request import Answer, Caller, RequestFlow
from agent.gateway import oip
from agent.gateway.http_messages import Request, Response, error_response
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


class _HttpWire:
    """A request as the flow reads it."""

    __slots__ = ("_limits", "_request", "_timeout_s", "announced_bytes", "complete")

    def __init__(self, request: Request, limits: oip.WireLimits, timeout_s: float) -> None:
        self._request = request
        self._limits = limits
        self._timeout_s = timeout_s
        self.announced_bytes = request.content_length
        self.complete = request.complete

    async def read(self, max_bytes: int) -> bytes:
        await self._request.arrive(max_bytes, self._timeout_s)
        return self._request.body(max_bytes)

    def body(self, max_bytes: int) -> bytes:
        return self._request.body(max_bytes)

    def decode(self, body: bytes, model: LoadedModel) -> InferRequest:
        header = self._request.header
        oip.check_content_type(header(b"content-type"))
        if header(b"content-encoding") not in {None, "identity"}:
            raise PeerError(415, "content_encoding", "a body with a Content-Encoding is not accepted")
        length = oip.parse_header_length(header(b"inference-header-content-length"))
        return oip.parse_infer_request(
            body, length, limits=self._limits, allow_nonfinite=model.manifest.allow_nonfinite
        )

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
        self.draining = False
        self.in_work = 0
        self.idle = asyncio.Event()  # set once nothing is in work while draining

    async def handle(self, request: Request) -> Response:
        """Answer one HTTP request."""
        self.in_work += 1
        try:
            if self.in_work > self._max_concurrent:
                busy = PeerError(503, "busy", "too many requests are in work", retry_after_s=1.0)
                response = await self._refuse(request, busy)
            elif (route := _route(request.path)) is None:
                response = await self._server(request)
            elif route[2] == "infer" and request.method == "POST":
                wire = _HttpWire(request, self._limits, self._body_timeout_s)
                response = _answer(await self._flow.infer(_caller(request), route[0], route[1], wire))
            else:
                response = await self._model(request, *route)
        except PeerError as error:
            response = _refusal(error)
        finally:
            self.in_work -= 1
            if self.draining and not self.in_work:
                self.idle.set()
        response.close = self.draining
        return response

    def drain(self) -> None:
        """Let every connection end with its next answer; ``idle`` is set when nothing is in work any more."""
        self.draining = True
        if not self.in_work:
            self.idle.set()

    async def _model(self, request: Request, model: str, version: str, verb: str | None) -> Response:
        if verb not in {None, "ready", "infer"}:
            return await self._refuse(request, PeerError(403, "surface", "not served here"))
        if request.method != "GET" or verb == "infer":
            return await self._refuse(request, _method("POST" if verb == "infer" else "GET"))
        loaded = await self._flow.metadata(_caller(request), model, version)
        if verb == "ready" or loaded is None:
            return Response(200)
        manifest = loaded.manifest
        versions = self._flow.registry.versions(manifest.name)
        return Response(200, oip.model_metadata(manifest.name, versions, manifest.inputs, manifest.outputs))

    async def _server(self, request: Request) -> Response:
        path = request.path
        if _REFUSED.fullmatch(path):
            words = "shared memory, repository, trace and log settings can't be used from outside"
            return await self._refuse(request, PeerError(403, "surface", words))
        if path not in _SERVER_PATHS:
            return await self._refuse(request, PeerError(404, "path", "no such path"))
        if request.method != "GET":
            return await self._refuse(request, _method("GET"))
        if path == "/v2/health/live":
            return Response(200)
        if path == "/v2/health/ready":
            return Response(200 if self._flow.registry.ready and not self.draining else 503)
        await self._flow.metadata(_caller(request))
        return Response(200, oip.server_metadata("edgewarden", __version__))

    async def _refuse(self, request: Request, error: PeerError) -> Response:
        """Answer, and record, what no flow looks at."""
        call = ascii(f"{request.method} {request.path}"[:MAX_RECORDED_CALL_CHARS])[1:-1]
        return _refusal(await self._flow.refuse(_caller(request), call, error))


@functools.lru_cache(maxsize=256)
def _route(path: str) -> tuple[str, str, str | None] | None:
    """Return model, version and verb of a path; None for a path that names no model."""
    match = _MODEL.fullmatch(path) if len(path) <= MAX_PATH_CHARS else None
    return None if match is None else (match["model"], match["version"] or "", match["verb"])


@functools.lru_cache(maxsize=4096)
def _duration(stage: str, micros: int) -> str:
    return f"{stage};dur={micros / 1000:g}"


def _method(allowed: str) -> PeerError:
    return PeerError(405, "method", f"{allowed} is the only method here")


def _caller(request: Request) -> Caller:
    return Caller(request.certificate, request.header(b"authorization"), request.source)


def _answer(answer: Answer) -> Response:
    timing = ", ".join([_duration(stage, micros) for stage, micros in answer.latency_us.items()])
    headers = (
        f"{DECISION_HEADER}: {answer.decision_id}\r\n{SALT_HEADER}: {answer.salt.hex()}\r\nServer-Timing: {timing}\r\n"
    )
    if answer.header_length is None:
        return Response(200, answer.body, headers=headers)
    headers += f"{oip.HEADER_LENGTH}: {answer.header_length}\r\n"
    return Response(200, answer.body, content_type="application/octet-stream", headers=headers)


def _refusal(error: PeerError) -> Response:
    headers = "" if error.retry_after_s is None else f"Retry-After: {max(1, round(error.retry_after_s))}\r\n"
    if error.status == 401:  # noqa: PLR2004 -- RFC 9110: a 401 names its scheme
        headers += "WWW-Authenticate: Bearer\r\n"
    return error_response(error.status, str(error), headers)
