"""NATS credentials files (``.creds``): a user's JWT and the seed of its key, as ``nsc`` writes them.

Rules:

1. A file is at most :data:`MAX_CREDENTIALS_BYTES` and holds one JWT and one seed of a user's key, each in its frame.
2. The seed never leaves this value: it signs the server's nonce and is no part of a text.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

import nkeys

from agent.errors import ConfigError

__all__ = ["MAX_CREDENTIALS_BYTES", "NatsCredentials", "load_credentials"]

MAX_CREDENTIALS_BYTES = 64 * 1024
_FRAME = rb"-+BEGIN %s-+\r?\n([A-Za-z0-9_.-]+)\r?\n-+END %s-+"
_JWT = re.compile(_FRAME % (b"NATS USER JWT", b"NATS USER JWT"))
_SEED = re.compile(_FRAME % (b"USER NKEY SEED", b"USER NKEY SEED"))


@dataclass(frozen=True, slots=True)
class NatsCredentials:
    """Who the controller is for NATS."""

    jwt: bytes
    _key: nkeys.KeyPair = field(repr=False)

    def sign(self, nonce: str) -> bytes:
        """Return the signature of the server's nonce (Ed25519), in base64."""
        return base64.b64encode(self._key.sign(nonce.encode()))


def load_credentials(path: str) -> NatsCredentials:
    """Read a credentials file.

    Raises:
        ConfigError: it can't be read, or is none; nothing of it is in the text.
    """
    where = f"nats.credentials: {path}"
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_CREDENTIALS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    if len(data) > MAX_CREDENTIALS_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_CREDENTIALS_BYTES} bytes")
    tokens, seeds = _JWT.findall(data), _SEED.findall(data)
    if len(tokens) != 1 or len(seeds) != 1:
        raise ConfigError(f"{where}: not a NATS credentials file: it holds one user JWT and one seed")
    try:
        prefix, raw = nkeys.decode_seed(seeds[0])
        key = nkeys.from_seed(seeds[0])
        is_whole = (
            nkeys.encode_seed(bytes(raw), prefix) == seeds[0]
        )  # the package itself does not look at the check sum
    except (nkeys.NkeysError, ValueError) as error:
        # The class alone: the cause's text may hold the seed.
        raise ConfigError(f"{where}: not the seed of a key ({type(error).__name__})") from None
    if prefix != nkeys.PREFIX_BYTE_USER or not is_whole:
        raise ConfigError(f"{where}: the seed is not a user's, or mistyped")
    return NatsCredentials(tokens[0], key)
