"""aiohttp's protocol, but for what it says of errors.

Rules:

1. What is no HTTP gets ``{"error": "…"}`` without an echo of what was sent, and no line in the log: its sender would write it.
2. What our own code fails at is logged, and its caller is told no more than that.
"""

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

__all__ = ["QuietProtocol", "make_protocol"]


class QuietProtocol(RequestHandler):
    """One connection; see the module."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is no HTTP, and what our own code fails at."""
        if status >= 500:  # noqa: PLR2004 -- ours
            self.log_exception("a request failed", exc_info=exc)
            message = "the node failed at this request"
        else:
            message = "this is not HTTP as it is spoken here"
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = web.json_response({"error": message}, status=status, headers={"Server": "edgewarden"})
        response.force_close()
        return response


def make_protocol(server: web.Server) -> RequestHandler:
    """Make the protocol of one connection of a server, as the server itself would."""
    return QuietProtocol(server, loop=server._loop, **server._kwargs)  # noqa: SLF001 -- what its own __call__ does; there is no hook
