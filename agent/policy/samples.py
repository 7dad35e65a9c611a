"""Sample inputs of contract version 1, one for each kind of question: a policy must decide all of them to be activated.

What the decisions are is the policy's matter; that there is one, in time and well formed, is not.
"""

from typing import Any

__all__ = ["SAMPLES"]

_SUBJECT = {"id": "sample", "kind": "mtls", "roles": ["sample"], "mfa": False, "claims": {}}
_RESOURCE = {
    "model": "sample",
    "version": "1",
    "digest": "0" * 64,
    "signer": "sample",
    "measured": True,
    "sensitivity": "low",
}
_REQUEST = {
    "bytes": 1024,
    "batch": 1,
    "source_ip": "127.0.0.1",
    "rate": {"1s": 1, "60s": 1},
    "budget_left": 1000,
    "anomaly": 0.5,
    "time": "2026-01-01T00:00:00Z",
}
_NODE = {"id": "sample", "trust": "unknown", "attested_age_s": 60, "posture": {}}


def _sample(action: str, **members: Any) -> dict[str, Any]:  # noqa: ANN401 -- members of a JSON document
    full = {"subject": _SUBJECT, "resource": _RESOURCE, "request": _REQUEST, "node": _NODE}
    return {**full, "action": action, **members}


SAMPLES: dict[str, dict[str, Any]] = {
    "infer": _sample("infer"),
    "infer by token": _sample("infer", subject={**_SUBJECT, "kind": "jwt", "mfa": True, "claims": {"iss": "sample"}}),
    "infer, little known": _sample("infer", request={"bytes": 1}, node={"id": "sample", "trust": "none"}),
    "metadata": _sample("metadata", subject={**_SUBJECT, "kind": "spiffe"}),
    "load": _sample("load", subject={"id": "agent", "kind": "unix", "roles": []}, request={}),
    "unload": _sample("unload", subject={"id": "agent", "kind": "unix", "roles": []}, request={}),
    "export": _sample("export"),
    "open": _sample("open"),
    "admin.status": _sample("admin.status", resource={}, node={**_NODE, "trust": "contraindicated"}),
    "an action that nobody knows": _sample("admin.sample", resource={}, request={}),
}
