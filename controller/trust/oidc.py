"""Admins that an OpenID provider vouches for: bearer tokens, verified against the provider's keys.

Rules (RFC 7519, RFC 8725, OpenID Connect Core 1.0 section 3.1.3.7):

1. A token is at most :data:`MAX_TOKEN_BYTES`, signed with one of :data:`ALGORITHMS` by a key of the provider's JWKS that its ``kid`` names. A symmetric
   algorithm is none of them.
2. ``iss`` and ``aud`` are the configured ones; ``exp``, ``iat`` and ``sub`` are required.
3. Roles are read from the configured claim; those that the controller does not know are left out.
4. The JWKS is fetched over verified TLS, kept for :data:`KEEP_S`, and fetched again for a key that is not in it, but no more often than :data:`FETCH_S`.
"""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import aiohttp
import jwt

from agent import clock
from agent.errors import ConfigError, HostError, PeerError
from agent.records import Principal
from controller.settings import OidcSettings
from controller.trust.authorize import ROLES

__all__ = ["ALGORITHMS", "OidcReader"]

ALGORITHMS = ("ES256", "RS256", "PS256", "EdDSA")
MAX_TOKEN_BYTES = 8 * 1024
MAX_JWKS_BYTES = 256 * 1024
MAX_SUBJECT_CHARS = 255
KEEP_S = 3600.0
FETCH_S = 10.0
TIMEOUT_S = 10
LEEWAY_S = 30


class OidcReader:
    """Reads tokens of one provider."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_us: int | None = None
        self._turn = asyncio.Lock()

    async def read(self, authorization: str) -> Principal:
        """Return who shows an ``Authorization`` header.

        Raises:
            PeerError: 401.
            HostError: the provider's keys can't be had.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise PeerError(401, "token_malformed", "the Authorization header must be 'Bearer' and one token")
        try:
            kid = jwt.get_unverified_header(token).get("kid", "")
            key = await self._key(str(kid))
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iat", "sub", "iss", "aud"]},
            )
        except jwt.PyJWTError as error:
            raise PeerError(401, "token_invalid", f"the token is not accepted: {error}") from error
        subject = claims["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT_CHARS or not subject.isprintable():
            raise PeerError(401, "token_invalid", "the token's sub is no name")
        named = claims.get(self._settings.roles_claim, [])
        roles = tuple(role for role in ROLES if isinstance(named, list) and role in named)
        return Principal(id=f"oidc/{subject}", kind="jwt", roles=roles)

    async def _key(self, kid: str) -> jwt.PyJWK:
        async with self._turn:
            now_us = clock.monotonic_us()
            age_s = None if self._fetched_us is None else (now_us - self._fetched_us) / 1e6
            if age_s is None or age_s > KEEP_S or (kid not in self._keys and age_s > FETCH_S):
                self._keys = _parse(await self._fetch())
                self._fetched_us = now_us
            if kid not in self._keys:
                raise PeerError(401, "token_invalid", "the token names no key of the provider")
            return self._keys[kid]

    async def _fetch(self) -> bytes:
        where = self._settings.jwks
        if not where.startswith("https://"):
            try:
                return await asyncio.to_thread(Path(where).read_bytes)
            except OSError as error:
                raise HostError(f"oidc.jwks: {where}: {error.strerror}") from error
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._context()), timeout=timeout) as session,
                session.get(where, allow_redirects=False) as answer,
            ):
                if answer.status != 200:  # noqa: PLR2004 -- OK
                    raise HostError(f"oidc.jwks: the provider answers {answer.status}")
                return await answer.content.read(MAX_JWKS_BYTES + 1)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HostError(f"oidc.jwks: the provider does not answer: {error!r}") from error

    def _context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._settings.ca)
        except OSError as error:
            raise ConfigError(f"oidc.ca: {self._settings.ca}: {error}") from error


def _parse(document: bytes) -> dict[str, jwt.PyJWK]:
    if len(document) > MAX_JWKS_BYTES:
        raise HostError(f"oidc.jwks: over {MAX_JWKS_BYTES} bytes")
    try:
        keys = jwt.PyJWKSet.from_json(document.decode()).keys
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise HostError(f"oidc.jwks: not a JWKS: {error}") from error
    return {key.key_id: key for key in keys if key.key_id and key.algorithm_name in ALGORITHMS}
