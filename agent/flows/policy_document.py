"""The part of a policy's data that the node enforces itself, validated: limits, sanitizers, output profiles.

A decision names a limit, a sanitizer or an output profile. Each name that the data itself uses must be there: an error refuses the
policy, before it is in force. The agent needs no more than this; the gateway compiles it (``policy_data``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from agent.errors import PolicyError
from agent.guard.admission import Limit, compile_limits
from agent.guard.profiles import OutputSpec, SanitizerSpec, validate_outputs, validate_sanitizers

__all__ = ["AREAS", "PolicyDocument"]

AREAS: Final = ("limits", "models", "sanitizers", "outputs", "node")


class _Limits(msgspec.Struct, frozen=True):
    limits: dict[str, Any]
    default: str
    subjects: dict[str, dict[str, str]] = {}
    roles: dict[str, str] = {}


class _Model(msgspec.Struct, frozen=True):
    limit: str | None = None


class _Models(msgspec.Struct, frozen=True):
    models: dict[str, _Model] = {}


class _Profiles(msgspec.Struct, frozen=True):
    profiles: dict[str, Any]


class _Node(msgspec.Struct, frozen=True):
    explain_denials: bool = False


class _Document(msgspec.Struct, frozen=True):
    """The areas, as far as they are read here; what else they hold is for Rego."""

    limits: _Limits
    models: _Models
    sanitizers: _Profiles
    outputs: _Profiles
    node: _Node


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """Validated data; ``default_limit`` is the most generous that a role may have."""

    limits: Mapping[str, Limit]
    default_limit: str
    subject_limits: Mapping[str, Mapping[str, str]]  # by kind and id
    model_limits: Mapping[str, str]
    sanitizers: Mapping[str, SanitizerSpec]
    outputs: Mapping[str, OutputSpec]
    explain_denials: bool

    @classmethod
    def parse(cls, document: bytes) -> PolicyDocument:
        """Validate the areas :data:`AREAS` of a bundle's data, as JSON.

        Raises:
            PolicyError: an area is missing or malformed.
        """
        try:
            data = msgspec.json.decode(document, type=_Document)
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"policy data: {error}") from error
        limits = compile_limits(data.limits.limits)
        models = {name: model.limit for name, model in data.models.models.items() if model.limit is not None}
        subjects = [name for of_kind in data.limits.subjects.values() for name in of_kind.values()]
        for name in (data.limits.default, *data.limits.roles.values(), *subjects, *models.values()):
            if name not in limits:
                raise PolicyError(f"policy data: there is no limit {name!r}")
        general = (data.limits.default, *data.limits.roles.values())
        return cls(
            limits,
            max(general, key=lambda name: limits[name].requests_per_second),
            data.limits.subjects,
            models,
            validate_sanitizers(data.sanitizers.profiles),
            validate_outputs(data.outputs.profiles),
            data.node.explain_denials,
        )
