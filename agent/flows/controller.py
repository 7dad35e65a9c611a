"""The node's door to its controller: HTTP over TLS 1.3, one POST at a time, everything bounded.

Rules:

1. Before anything of the join token is said, the listener's certificate is read over a connection on which nothing is said, and its key
   compared with the token's. Then exactly that certificate is trusted, so that who answers holds the key.
2. After the grant the controller's CA is trusted, with the host's name.
3. No proxy of the environment's, no redirect, no cookie, no content coding.
4. A call ends after :data:`CALL_TIMEOUT_S`, an answer at its limit in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ssl
from collections.abc import AsyncIterator
from typing import Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from agent.attest.enrolment import read_message
from agent.errors import ControllerError, VerificationError
from agent.isolation.memfd import seal_bytes

__all__ = [
    "CALL_TIMEOUT_S",
    "MAX_REFUSAL_BYTES",
    "ControllerLink",
    "ca_context",
    "controller_origin",
    "key_sha256",
    "open_link",
    "pinned_context",
]

CALL_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 15.0
MAX_REFUSAL_BYTES: Final = 4096
MAX_REFUSAL_CHARS: Final = 300
_HTTP_OK = 200
_T = TypeVar("_T")


class _Refusal(msgspec.Struct):
    error: str = ""


def controller_origin(url: str) -> tuple[str, str, int]:
    """Return ``https://host:port``, host and port of a controller's address.

    Raises:
        VerificationError: ``join-token``: it is no such address, or says more than that.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 443
    except ValueError as error:
        raise VerificationError("join-token", "the controller's address is malformed") from error
    if parts.scheme != "https" or not host or parts.path not in {"", "/"}:
        raise VerificationError("join-token", "the controller's address must be https://host:port")
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        raise VerificationError("join-token", "the controller's address must be https://host:port")
    shown = f"[{host}]" if ":" in host else host
    return f"https://{shown}:{port}", host, port


def key_sha256(key: CertificatePublicKeyTypes) -> str:
    """Return the hex SHA-256 of a key's SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


async def pinned_context(url: str, expected_spki_sha256: str) -> ssl.SSLContext:
    """Return a context that trusts exactly the certificate that the listener shows, if its key is the expected one.

    Raises:
        ControllerError: the listener can't be reached.
        VerificationError: ``controller-key``: it shows another key.
    """
    _, host, port = controller_origin(url)
    looking = _client_context()
    looking.check_hostname = False
    looking.verify_mode = ssl.CERT_NONE  # to look only: nothing is sent, and the connection is closed again
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=looking, server_hostname=host)
    except (
        OSError,
        ValueError,
    ) as error:  # TLS errors and time-outs are OSErrors; a host that is no name is a ValueError
        raise ControllerError(f"{url}: no connection: {_words(error)}") from error
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()
    try:
        shown = key_sha256(x509.load_der_x509_certificate(der or b"").public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise VerificationError("controller-key", "the listener shows no certificate that can be read") from error
    if not hmac.compare_digest(shown, expected_spki_sha256):
        raise VerificationError(
            "controller-key", "the listener's key is not the one of the join token: this is not your controller"
        )
    context = _client_context()
    context.check_hostname = False  # the token names a key, which says more than a name
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=der)
    return context


def ca_context(ca: bytes, certificate: bytes | None = None, key: bytes | None = None) -> ssl.SSLContext:
    """Return a context that trusts the controller's CA, with host names; and shows the node's certificate, where there is one.

    Raises:
        VerificationError: ``enrolment``: these are no certificates, or do not belong together.
    """
    context = _client_context()
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
        if certificate is not None and key is not None:
            chain_file, key_file = seal_bytes("certificate", certificate), seal_bytes("key", key)
            try:
                # The library wants paths. An encrypted key gets no password: it would be asked for on the terminal.
                paths = (f"/proc/self/fd/{chain_file.fd}", f"/proc/self/fd/{key_file.fd}")
                context.load_cert_chain(*paths, password=lambda: "")
            finally:
                chain_file.close()
                key_file.close()
    except (OSError, ValueError) as error:
        raise VerificationError("enrolment", f"certificates that do not load: {_words(error)}") from error
    return context


class ControllerLink:
    """Calls to one controller over a connection that is kept. Make it with :func:`open_link`."""

    def __init__(self, origin: str, session: aiohttp.ClientSession) -> None:
        self._origin = origin
        self._session = session

    async def post(self, path: str, message: bytes, as_type: type[_T], limit: int) -> _T:
        """Send a message and return the answer.

        Args:
            path: of the node protocol.
            message: JSON.
            as_type: of the answer.
            limit: of the answer, in bytes.

        Raises:
            ControllerError: no answer, a refusal, or more than ``limit``.
            VerificationError: ``encoding``: the answer is no such message.
        """
        try:
            async with self._session.post(self._origin + path, data=message, allow_redirects=False) as response:
                body = await _read(response, limit)
                status = response.status
        except (aiohttp.ClientError, OSError) as error:  # time-outs are OSErrors
            raise ControllerError(f"{self._origin}: no answer: {_words(error)}") from error
        if status != _HTTP_OK:
            raise ControllerError(f"{self._origin}: refused with {status}: {_refusal(body)}", status)
        return read_message(body, as_type, limit)


@contextlib.asynccontextmanager
async def open_link(url: str, context: ssl.SSLContext) -> AsyncIterator[ControllerLink]:
    """Give calls to a controller; connections are opened by the first call and closed at the end.

    Raises:
        VerificationError: as :func:`controller_origin`.
    """
    origin, _, _ = controller_origin(url)
    connector = aiohttp.TCPConnector(ssl=context, limit=1)
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=CALL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "edgewarden"},
    )
    async with session:
        yield ControllerLink(origin, session)


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    limit = limit if response.status == _HTTP_OK else MAX_REFUSAL_BYTES
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise ControllerError(f"an answer of over {limit} bytes", response.status)
    return bytes(body)


def _refusal(body: bytes) -> str:
    """Return the controller's words, as far as they may stand in a log."""
    try:
        text = msgspec.json.decode(body, type=_Refusal).error
    except (ValueError, RecursionError):  # brackets nested without end
        return "no reason given"
    return "".join(char if char.isprintable() else "?" for char in text[:MAX_REFUSAL_CHARS]) or "no reason given"


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # of an SSLError; aiohttp's own errors of TLS are such, and have none
    return reason.lower().replace("_", " ") if isinstance(reason, str) else str(error) or type(error).__name__
