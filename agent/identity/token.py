"""A bearer token becomes a Principal: JSON Web Tokens signed with ES256 by a key that the operator configured.

Rules, in the order of the checks (RFC 7515, 7517, 7518, 7519, 8725; RFC 6750 for the header):

1. A token is at most :data:`MAX_TOKEN_BYTES` in three base64url parts; nothing is parsed before that is known.
2. Its header says ``"alg": "ES256"`` and names a key by ``kid``. The algorithm is fixed here, never taken from the token or
   the key; a critical extension (``crit``) is refused; keys or addresses of keys in a header are never used.
3. The key is one of the JWKS document that was configured.
4. The signature verifies.
5. The claims are one JSON object without duplicate keys, NaN or deep nesting.
6. ``exp`` is required; ``nbf`` and ``iat`` are honoured; all three with the configured leeway, at every use.
7. ``aud`` is required and names this node's audience; ``iss`` is the configured issuer where there is one.
8. ``sub`` is required and is the id; the configured claim gives the roles; ``amr`` with ``mfa`` (RFC 8176) sets mfa.

A token that passed is remembered by its SHA-256, so that a lookup tells an attacker nothing about another token, and only
its times are checked again. No error or log holds a token's text.
"""

from __future__ import annotations

import hashlib
import re
from base64 import urlsafe_b64decode
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The library imports this at the first verification, which in a sandbox is too late.
import cryptography.hazmat.backends.openssl.backend  # noqa: F401 -- imported for that effect
import jiter
import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from agent import clock
from agent.errors import ConfigError, PeerError
from agent.records import Principal

__all__ = [
    "MAX_CACHED_TOKENS",
    "MAX_JWKS_BYTES",
    "MAX_JWKS_KEYS",
    "MAX_TOKEN_BYTES",
    "TokenVerifier",
    "bearer_token",
    "parse_jwks",
]

MAX_TOKEN_BYTES = 8 * 1024
MAX_CACHED_TOKENS = 4096
MAX_JWKS_BYTES = 64 * 1024
MAX_JWKS_KEYS = 64
MAX_ROLES = 32
MAX_CLAIM_DEPTH = 8
DEFAULT_LEEWAY_S = 30.0
_COORDINATE_BYTES = 32  # P-256

_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
_BEARER = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.ASCII | re.IGNORECASE)
_SUBJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@:/|+-]{0,255}", re.ASCII)
_ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}", re.ASCII)
_KEY_ID = re.compile(r"[\x21-\x7e]{1,128}", re.ASCII)


def bearer_token(authorization: str) -> str:
    """Return the token of an ``Authorization`` header.

    Raises:
        PeerError: 401, when the header is not of the Bearer scheme.
    """
    match = _BEARER.fullmatch(authorization) if len(authorization) <= MAX_TOKEN_BYTES + 16 else None
    if match is None:
        raise _refuse("token_malformed", "the Authorization header must be 'Bearer' and one token")
    return match[1]


def parse_jwks(document: bytes) -> dict[str, ec.EllipticCurvePublicKey]:
    """Read the P-256 keys of a JWKS document (RFC 7517) by their ``kid``.

    Raises:
        ConfigError: the document is malformed, holds a private or a foreign key, or two keys of one ``kid``.
    """
    if len(document) > MAX_JWKS_BYTES:
        raise ConfigError(f"jwks: larger than {MAX_JWKS_BYTES} bytes")
    try:
        jwks = jiter.from_json(document, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        raise ConfigError(f"jwks: not JSON ({error})") from error
    members = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(members, list) or not 1 <= len(members) <= MAX_JWKS_KEYS:
        raise ConfigError(f"jwks: 'keys' must be a list of 1 to {MAX_JWKS_KEYS} keys")
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for index, member in enumerate(members):
        kid, key = _parse_jwk(member, f"jwks: keys[{index}]")
        if kid in keys:
            raise ConfigError(f"jwks: keys[{index}]: the kid is used twice")
        keys[kid] = key
    return keys


def _parse_jwk(member: object, where: str) -> tuple[str, ec.EllipticCurvePublicKey]:
    if not isinstance(member, dict):
        raise ConfigError(f"{where}: not an object")
    if "d" in member:
        raise ConfigError(f"{where}: a private key; a node needs public keys only")
    if member.get("kty") != "EC" or member.get("crv") != "P-256":
        raise ConfigError(f"{where}: only EC keys on P-256 are accepted")
    if member.get("alg", "ES256") != "ES256" or member.get("use", "sig") != "sig":
        raise ConfigError(f"{where}: the key is not for ES256 signatures")
    if member.get("key_ops", ["verify"]) != ["verify"]:
        raise ConfigError(f"{where}: key_ops must be ['verify']")
    kid = member.get("kid")
    if not isinstance(kid, str) or _KEY_ID.fullmatch(kid) is None:
        raise ConfigError(f"{where}: needs a kid of 1 to 128 printable ASCII characters")
    try:
        x, y = (_coordinate(member.get(name)) for name in ("x", "y"))
        return kid, ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    except ValueError as error:
        raise ConfigError(f"{where}: x and y are not a point on P-256") from error


def _coordinate(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError("not a string")  # noqa: TRY004 -- one kind of error for the one caller
    octets = urlsafe_b64decode(value + "=")
    if len(octets) != _COORDINATE_BYTES:
        raise ValueError("not 32 octets")
    return int.from_bytes(octets)


@dataclass(frozen=True, slots=True)
class _Verified:
    principal: Principal
    not_before: float
    not_after: float


class TokenVerifier:
    """Verifies tokens against one JWKS document; a new document means a new verifier.

    Args:
        jwks: the JWKS document's bytes.
        audience: what ``aud`` must name.
        issuer: what ``iss`` must be, or None.
        roles_claim: the claim that holds the roles: a list of strings, or one string of words.
        leeway_s: how far the issuer's clock may be from ours, in seconds.
        wall_clock: seconds since the Unix epoch.
        capacity: how many verified tokens are remembered.

    Raises:
        ConfigError: the JWKS document is refused.
    """

    def __init__(
        self,
        jwks: bytes,
        *,
        audience: str,
        issuer: str | None = None,
        roles_claim: str = "roles",
        leeway_s: float = DEFAULT_LEEWAY_S,
        wall_clock: Callable[[], float] = clock.now,
        capacity: int = MAX_CACHED_TOKENS,
    ) -> None:
        self._keys = parse_jwks(jwks)
        self._audience = audience
        self._issuer = issuer
        self._roles_claim = roles_claim
        self._leeway_s = leeway_s
        self._clock = wall_clock
        self._capacity = capacity
        self._jws = jwt.PyJWS(algorithms=["ES256"])
        self._known: OrderedDict[bytes, _Verified] = OrderedDict()

    def principal(self, token: str) -> Principal:
        """Verify a token and return whom it names.

        Raises:
            PeerError: 401, with the rule that the token breaks.
        """
        if len(token) > MAX_TOKEN_BYTES or not token.isascii():  # 1, before anything is computed over it
            raise _refuse("token_too_large", f"the token is not ASCII of at most {MAX_TOKEN_BYTES} bytes")
        key = hashlib.sha256(token.encode()).digest()
        verified = self._known.get(key)
        if verified is None:
            verified = self._verify(token)
            self._check_period(verified)
            self._known[key] = verified
            if len(self._known) > self._capacity:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
            self._check_period(verified)
        return verified.principal

    def _check_period(self, verified: _Verified) -> None:
        now = self._clock()
        if now >= verified.not_after + self._leeway_s:  # 6
            raise _refuse("token_expired", "the token has expired")
        if now < verified.not_before - self._leeway_s:
            raise _refuse("token_not_yet_valid", "the token is not valid yet")

    def _verify(self, token: str) -> _Verified:
        # 1. Three base64url parts.
        if _JWS.fullmatch(token) is None:
            raise _refuse("token_malformed", "the token is not a signed JWT in compact form")
        # 2. and 3. The algorithm and the key.
        key = self._key(token)
        # 4. The signature.
        try:
            payload: bytes = self._jws.decode_complete(token, key, algorithms=["ES256"])["payload"]
        except jwt.InvalidSignatureError as error:
            raise _refuse("token_signature", "the token's signature does not verify") from error
        except (jwt.PyJWTError, ValueError) as error:
            raise _refuse("token_malformed", "the token cannot be decoded") from error
        # 5. The claims.
        claims = _parse_object(payload, "token_claims", "the token's claims")
        if not _is_shallow(claims, MAX_CLAIM_DEPTH):
            raise _refuse("token_claims", f"the token's claims are nested deeper than {MAX_CLAIM_DEPTH}")
        # 6. The period; compared with the clock at every use.
        expires = _time(claims, "exp", None)
        starts = max(_time(claims, "nbf", 0.0), _time(claims, "iat", 0.0))
        # 7. Audience and issuer.
        audiences = claims.get("aud")
        if audiences != self._audience and not (isinstance(audiences, list) and self._audience in audiences):
            raise _refuse("token_audience", "the token is not for this audience")
        if self._issuer is not None and claims.get("iss") != self._issuer:
            raise _refuse("token_issuer", "the token is not from the configured issuer")
        # 8. Who.
        subject = claims.get("sub")
        if not isinstance(subject, str) or _SUBJECT.fullmatch(subject) is None:
            raise _refuse("token_subject", "the token's sub is missing or holds characters that an id may not have")
        methods = claims.get("amr")
        mfa = isinstance(methods, list) and "mfa" in methods
        roles = _roles(claims.get(self._roles_claim, []))
        principal = Principal(id=subject, kind="jwt", roles=roles, mfa=mfa, claims=dict(claims))
        return _Verified(principal, starts, expires)

    def _key(self, token: str) -> ec.EllipticCurvePublicKey:
        encoded = token.partition(".")[0]
        try:
            text = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        except ValueError as error:
            raise _refuse("token_malformed", "the token's header is not base64url") from error
        header = _parse_object(text, "token_malformed", "the token's header")
        if header.get("alg") != "ES256":
            raise _refuse("token_algorithm", "the token's algorithm is not ES256")
        if "crit" in header or "b64" in header:
            raise _refuse("token_header", "the token's header has a critical extension")
        kid = header.get("kid")
        key = self._keys.get(kid) if isinstance(kid, str) else None
        if key is None:
            raise _refuse("token_unknown_key", "the token's kid names no configured key")
        return key


def _parse_object(text: bytes, reason: str, what: str) -> Mapping[str, Any]:
    try:
        value = jiter.from_json(text, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        # The parser's words may quote the text: they are not passed on.
        raise _refuse(reason, f"{what} cannot be parsed as JSON without duplicate keys") from error
    if not isinstance(value, dict):
        raise _refuse(reason, f"{what} are not one JSON object")
    return value


def _is_shallow(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    members = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(member, depth - 1) for member in members)


def _time(claims: Mapping[str, Any], name: str, default: float | None) -> float:
    value = claims.get(name, default)
    # A bool is an int in Python; an infinite or huge number would make a token that never expires.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise _refuse("token_claims", f"the token's {name} is missing or is not a time")
    return float(value)


def _roles(value: object) -> tuple[str, ...]:
    names = value.split() if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > MAX_ROLES:
        raise _refuse("token_roles", f"the token's roles are not a list of at most {MAX_ROLES} names")
    roles = [name for name in names if isinstance(name, str) and _ROLE.fullmatch(name)]
    if len(roles) != len(names):
        raise _refuse("token_roles", "one of the token's roles is no role name")
    return tuple(sorted(set(roles)))


def _refuse(reason: str, message: str) -> PeerError:
    return PeerError(401, reason, message)
