"""TLS of the node's listeners, checked by the agent before any child or port depends on it.

Rules:

1. TLS 1.3 only; a client certificate is demanded.
2. What does not fit is a ConfigError that names the setting, at the start: a gateway that can't load its key would only die, again and again.
3. An expired certificate does not stop the node (it may be renewed over the network); it is said aloud and stands in the health.
"""

from __future__ import annotations

import ssl

import structlog
from cryptography import x509

from agent import clock
from agent.errors import ConfigError
from agent.isolation.memfd import seal_bytes

__all__ = ["check_expiry", "server_context"]

_log = structlog.get_logger(__name__)


def server_context(
    section: str, certificate: bytes, key: bytes, client_ca: bytes, *, ca_setting: str = "client_ca"
) -> ssl.SSLContext:
    """Build a listener's context from PEM.

    Args:
        section: of the configuration, for the error.
        certificate: the server's chain.
        key: its private key, not encrypted.
        client_ca: CAs that sign clients' certificates.
        ca_setting: what the section calls it.

    Raises:
        ConfigError: they are no certificates, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    chain_file, key_file = seal_bytes("certificate", certificate), seal_bytes("key", key)
    try:
        # The library wants paths. An encrypted key gets no password: it would be asked for on the terminal.
        paths = (f"/proc/self/fd/{chain_file.fd}", f"/proc/self/fd/{key_file.fd}")
        context.load_cert_chain(*paths, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"{section}.certificate, {section}.key: they do not load together: {_words(error)}"
        ) from error
    finally:
        chain_file.close()
        key_file.close()
    try:
        context.load_verify_locations(cadata=client_ca.decode("ascii"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{section}.{ca_setting}: not PEM certificates: {_words(error)}") from error
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _words(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return reason.lower().replace("_", " ") if reason else str(error)


def check_expiry(setting: str, certificate: bytes) -> str:
    """Return until when a PEM certificate is valid (RFC 3339); warn when that is over."""
    until = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    text = clock.rfc3339(int(until.timestamp()) * 1_000_000)
    if until.timestamp() < clock.now():
        _log.warning("certificate_expired", setting=setting, until=text)
    return text
