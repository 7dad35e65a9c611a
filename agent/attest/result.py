"""Attestation Results: EAT Attestation Results (draft-ietf-rats-ear-04) as signed JWTs; made by a controller, verified by its nodes.

Rules:

1. A result is an ES256 JWT whose header names a key of the controller's JWKS; the algorithm is fixed here.
2. It holds one submodule, named as the node; ``eat_nonce`` is the nonce of the Evidence that it speaks of.
3. What the controller adds stands in ``ear_verifier_claims``: the checks, when the next result is due, and the digests of model files that were
   withdrawn, which the node must not load whatever its own policy says.
4. A reader ignores claims that it does not know (the draft demands it) and takes none of another type than it must have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from agent.attest.evidence import HexDigest
from agent.errors import VerificationError

__all__ = ["EAT_PROFILE", "MAX_RESULT_BYTES", "MAX_TIME_S", "MAX_WITHDRAWN", "AttestationResult", "CheckResult", "Tier"]

EAT_PROFILE: Final = "tag:ietf.org,2026:rats/ear#04"
MAX_RESULT_BYTES = 512 * 1024
MAX_WITHDRAWN = 4096  # digests
MAX_TIME_S = 253_402_300_799  # the last second of the year 9999, beyond which a time has no text
_ALGORITHM = "ES256"
_CHECK = "result"

Tier: TypeAlias = Literal["none", "affirming", "warning", "contraindicated"]


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """One check that is not ``ok``: its name, its outcome, words for a reader, and the entries of the log that it is about."""

    name: str
    outcome: str
    words: str = ""
    entries: tuple[str, ...] = ()


class _VerifierClaims(msgspec.Struct, frozen=True):
    checks: tuple[CheckResult, ...] = msgspec.field(default=(), name="edgewarden_checks")
    interval_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = msgspec.field(default=60, name="edgewarden_interval_s")
    withdrawn: Annotated[frozenset[HexDigest], msgspec.Meta(max_length=MAX_WITHDRAWN)] = msgspec.field(
        default=frozenset(), name="edgewarden_withdrawn"
    )


class _Appraisal(msgspec.Struct, frozen=True, omit_defaults=True):
    ear_status: Tier
    ear_trustworthiness_vector: dict[str, int] = {}
    ear_appraisal_policy_ids: tuple[str, ...] = ()
    ear_verifier_claims: _VerifierClaims = _VerifierClaims()


class _VerifierId(msgspec.Struct, frozen=True):
    developer: str
    build: str


class _Claims(msgspec.Struct, frozen=True):
    eat_profile: Literal["tag:ietf.org,2026:rats/ear#04"]
    iat: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIME_S)]
    eat_nonce: HexDigest
    ear_verifier_id: _VerifierId
    submods: Annotated[dict[str, _Appraisal], msgspec.Meta(min_length=1, max_length=1)]


class AttestationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a Verifier found.

    Attributes:
        node: whom it speaks of.
        status: the tier.
        issued_at: seconds since the Unix epoch.
        nonce: of the Evidence.
        vector: AR4SI's trustworthiness vector by claim name.
        policy_id: which Reference Values it was appraised against.
        build: the controller's name and version.
        checks: those that are not ``ok``.
        interval_s: until the next result is due.
        withdrawn: digests of model files that must not be loaded.
    """

    node: str
    status: Tier
    issued_at: int
    nonce: str
    vector: dict[str, int]
    policy_id: str
    build: str
    checks: tuple[CheckResult, ...] = ()
    interval_s: int = 60
    withdrawn: frozenset[str] = frozenset()

    def sign(self, key: ec.EllipticCurvePrivateKey, kid: str) -> str:
        """Return it as a JWT."""
        claims = _Claims(
            eat_profile=EAT_PROFILE,
            iat=self.issued_at,
            eat_nonce=self.nonce,
            ear_verifier_id=_VerifierId("https://edgewarden.example", self.build),
            submods={
                self.node: _Appraisal(
                    self.status,
                    self.vector,
                    (self.policy_id,),
                    _VerifierClaims(self.checks, self.interval_s, self.withdrawn),
                )
            },
        )
        plain: dict[str, Any] = msgspec.to_builtins(claims, order="deterministic")
        return jwt.encode(plain, key, algorithm=_ALGORITHM, headers={"kid": kid, "typ": "eat+jwt"})

    @classmethod
    def verify(cls, token: str, keys: Mapping[str, ec.EllipticCurvePublicKey], node: str) -> AttestationResult:
        """Read a JWT.

        Args:
            token: compact JWS.
            keys: of the controller, by ``kid``.
            node: whom it must speak of.

        Raises:
            VerificationError: ``result``.
        """
        # 1. Small enough, by a key that is known.
        if len(token) > MAX_RESULT_BYTES:
            raise VerificationError(_CHECK, f"over {MAX_RESULT_BYTES} bytes")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = keys.get(kid) if isinstance(kid, str) else None
            if key is None:
                raise VerificationError(_CHECK, "signed by a key that is not the controller's")
            # 2. Its signature, by the one algorithm. Times are judged by the caller: a node's clock may be wrong.
            body = jwt.decode_complete(
                token,
                key,
                algorithms=[_ALGORITHM],
                options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False},
            )["payload"]
            # 3. The shape.
            claims = msgspec.convert(body, _Claims)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise VerificationError(_CHECK, f"not an Attestation Result: {error}") from error
        # 4. About this node.
        ((name, appraisal),) = claims.submods.items()
        if name != node:
            raise VerificationError(_CHECK, "it speaks of another node")
        return cls(
            node=name,
            status=appraisal.ear_status,
            issued_at=claims.iat,
            nonce=claims.eat_nonce,
            vector=appraisal.ear_trustworthiness_vector,
            policy_id=appraisal.ear_appraisal_policy_ids[0] if appraisal.ear_appraisal_policy_ids else "",
            build=claims.ear_verifier_id.build,
            checks=appraisal.ear_verifier_claims.checks,
            interval_s=appraisal.ear_verifier_claims.interval_s,
            withdrawn=appraisal.ear_verifier_claims.withdrawn,
        )
