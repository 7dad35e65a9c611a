"""How the controller reaches a node's control listener: TLS 1.3, the node's key pinned instead of a chain.

The peer's certificate may have expired and its chain is not looked at: what its key must be is in the attested claims, and the appraiser compares.
TLS proves that the peer holds the key.
"""

from __future__ import annotations

import ssl

import aiohttp
from aiohttp.connector import Connection
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import ConfigError
from controller.trust.authority import Authority, spki_sha256

__all__ = ["PinnedResponse", "certificate_spki", "poll_context"]


def poll_context(authority: Authority) -> ssl.SSLContext:
    """Return the context of a poller: the controller's own certificate, and no opinion on the peer's chain.

    Raises:
        ConfigError: the controller's files do not load.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        context.load_cert_chain(*authority.server_files)
    except OSError as error:
        raise ConfigError(f"keys: server.pem, server.key: {error}") from error
    return context


def certificate_spki(der: bytes | None) -> str:
    """Return the digest of a certificate's EC key, or nothing that any key has."""
    if der is None:
        return ""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        return ""
    return spki_sha256(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""


class PinnedResponse(aiohttp.ClientResponse):
    """Remembers the key of the peer that the answer came from, before the connection goes back to its pool."""

    peer_spki_sha256: str = ""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Take the peer's certificate, then go on as usual."""
        transport = connection.transport
        tls = transport.get_extra_info("ssl_object") if transport is not None else None
        self.peer_spki_sha256 = certificate_spki(tls.getpeercert(binary_form=True) if tls is not None else None)
        return await super().start(connection)
