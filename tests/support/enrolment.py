"""An enrolled node's identity, without a node."""

from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from agent.flows.enrolled import Enrolment, Identity, new_key
from tests.support.controller import TRUST_DOMAIN, Ca, jwks, pem, private_key

__all__ = ["identity_of"]


def identity_of(
    signing_key: ec.EllipticCurvePrivateKey,
    ca: Ca | None = None,
    *,
    begin_s: float = -60,
    end_s: float = 86400,
    **changes: Any,
) -> Identity:
    """Return node ``n1`` at a controller whose results ``signing_key`` signs."""
    ca = ca or Ca()
    fields: dict[str, Any] = {
        "url": "https://controller.example",
        "node": "n1",
        "mode": "push",
        "trust_domain": TRUST_DOMAIN,
        "interval_s": 60,
        "jwks": jwks(signing_key),
        "since": 1,
    }
    enrolment = Enrolment(**{**fields, **changes})
    key = new_key()
    name = f"spiffe://{TRUST_DOMAIN}/node/{enrolment.node}"
    certificate = ca.issue(private_key(key).public_key(), name, begin_s=begin_s, end_s=end_s)
    return Identity.build(enrolment, key, pem(certificate).encode(), pem(ca.root).encode())
