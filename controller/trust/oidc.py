"""Admins that an OpenID provider vouches for: bearer tokens, verified against the provider's keys.

Rules (RFC 7519, RFC 8725, OpenID Connect Core 1.0 section 3.1.3.7):

1. A token is at most :data:`MAX_TOKEN_BYTES`, signed with one of :data:`ALGORITHMS` by a key of the provider's JWKS that its ``kid`` names. A symmetric
   algorithm is none of them.
2. ``iss`` and ``aud`` are the configured ones; ``exp``, ``iat`` and ``sub`` are required.
3. Roles are read from the configured claim; those that the controller does not know are left out.
4. The JWKS is fetched over verified TLS, kept for :data:`KEEP_S`, and fetched again for a key that is not in it, but no more often than :data:`FETCH_S`,
   whether that goes well or not: nobody makes the controller call the provider at will, or everybody wait for it.
"""

from __future__ import annotations

import asyncio
import math
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
MAX_SUBJECT_CHARS = 250  # with `oidc/` before it, as many as a column of the database holds
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
        self._tried_us: int | None = None
        self._failure = ""
        self._turn = asyncio.Lock()

    async def read(self, authorization: str) -> Principal:
        """Return who shows an ``Authorization`` header.

        Raises:
            PeerError: 401.
            HostError: the provider's keys can't be had.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not 0 < len(token) <= MAX_TOKEN_BYTES or not token.isascii():
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
            if _age_s(self._fetched_us) > KEEP_S:
                self._keys = {}
            if kid not in self._keys and _age_s(self._tried_us) > FETCH_S:
                await self._refresh()
            if kid in self._keys:
                return self._keys[kid]
            if self._failure:
                raise HostError(self._failure)
            raise PeerError(401, "token_invalid", "the token names no key of the provider")

    async def _refresh(self) -> None:
        try:
            self._keys, self._failure = _parse(await self._fetch()), ""
            self._fetched_us = clock.monotonic_us()
        except HostError as error:  # the keys that are there hold for as long as they would without this attempt
            self._failure = str(error)
        self._tried_us = clock.monotonic_us()

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
                parts: list[bytes] = []
                size = 0
                async for part in answer.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_JWKS_BYTES:
                        break
                return b"".join(parts)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HostError(f"oidc.jwks: the provider does not answer: {error!r}") from error

    def _context(self) -> ssl.SSLContext:
        try:
            return ssl.create_default_context(cafile=self._settings.ca)
        except OSError as error:
            raise ConfigError(f"oidc.ca: {self._settings.ca}: {error}") from error


def _age_s(moment_us: int | None) -> float:
    return math.inf if moment_us is None else (clock.monotonic_us() - moment_us) / 1e6


def _parse(document: bytes) -> dict[str, jwt.PyJWK]:
    if len(document) > MAX_JWKS_BYTES:
        raise HostError(f"oidc.jwks: over {MAX_JWKS_BYTES} bytes")
    try:
        keys = jwt.PyJWKSet.from_json(document.decode()).keys
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise HostError(f"oidc.jwks: not a JWKS: {error}") from error
    return {key.key_id: key for key in keys if key.key_id and key.algorithm_name in ALGORITHMS}
