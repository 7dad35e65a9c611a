"""The control listener: served with the operator's certificate from the start on, or with the enrolled one for as long as the node is enrolled.

Rules:

1. The socket is bound at the start of the process; it listens only while there is a certificate to serve it with.
2. With the enrolled certificate a caller must show one of the controller's CA, and be the controller by its SPIFFE ID: every node has a
   certificate of that CA, too.
3. A renewed certificate serves new connections; those that are open go on.
"""

from __future__ import annotations

import socket
import ssl

from aiohttp import web

from agent.control.serving import Surface
from agent.control.surface import NodeControl, evidence_application
from agent.daemon.tls import server_context
from agent.errors import HostError
from agent.flows.enrolled import Identity

__all__ = ["ControlListener"]


class ControlListener:
    """One listener, served or not.

    Args:
        sock: bound; closed by its owner.
        control: what is behind it.
    """

    def __init__(self, sock: socket.socket, control: NodeControl) -> None:
        self._sock = sock
        self._control = control
        self._runner: web.AppRunner | None = None
        self._surface: Surface | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it is bound to."""
        host, port = self._sock.getsockname()[:2]
        return str(host), int(port)

    async def serve_configured(self, context: ssl.SSLContext, spki_sha256: str) -> None:
        """Serve with the operator's own certificate, whoever that certificate authority calls a controller."""
        await self._serve(evidence_application(self._control, spki_sha256), context)

    async def serve_enrolled(self, identity: Identity) -> None:
        """Serve the controller, and it alone; again, with another certificate, the same.

        Raises:
            ConfigError: the certificates do not load.
        """
        context = server_context("control", identity.certificate, identity.key, identity.ca)
        if self._surface is not None:
            self._surface.use(context)
            return
        application = evidence_application(self._control, identity.spki_sha256, identity.controller_id)
        await self._serve(application, context)

    async def _serve(self, application: web.Application, context: ssl.SSLContext) -> None:
        runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await runner.setup()
        if runner.server is None:
            raise HostError("the control listener can't be served")
        self._runner = runner
        self._surface = Surface(runner.server, self._sock, context)
        self._surface.start()

    async def stop(self) -> None:
        """Listen no more, and end what is open."""
        surface, runner = self._surface, self._runner
        self._surface = self._runner = None
        if surface is not None and runner is not None:
            surface.stop()
            self._sock.shutdown(socket.SHUT_RDWR)
            await runner.cleanup()
