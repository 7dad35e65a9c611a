"""The part of the policy's data that the gateway enforces itself: limits, sanitizers, output profiles.

A decision names a limit, a sanitizer or an output profile; what the name means is compiled here once, at activation. A name that the data
does not have is an error, and an error is a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from agent.errors import PolicyError
from agent.guard.admission import Limit, compile_limits
from agent.guard.egress import OutputProfile, compile_outputs
from agent.guard.sanitize import Profile, compile_profiles
from agent.inference.manifest import ModelManifest
from agent.records import Principal

__all__ = ["AREAS", "PolicyData"]

AREAS: Final = ("limits", "models", "sanitizers", "outputs", "node")
IMAGE_DEFAULT: Final = "image-default"
TENSOR_DEFAULT: Final = "tensor-default"
FULL_OUTPUT: Final = "full"


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
class PolicyData:
    """Compiled data. An empty one (before the first activation) refuses everything: it has no limit to admit by."""

    policy_sha256: str = ""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    default_limit: str = ""
    subject_limits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by kind and id
    model_limits: Mapping[str, str] = field(default_factory=dict)
    sanitizers: Mapping[str, Profile] = field(default_factory=dict)
    outputs: Mapping[str, OutputProfile] = field(default_factory=dict)
    explain_denials: bool = False

    @classmethod
    def parse(cls, document: bytes, policy_sha256: str = "") -> PolicyData:
        """Compile the areas :data:`AREAS` of a bundle's data, as JSON.

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
            policy_sha256,
            limits,
            max(general, key=lambda name: limits[name].requests_per_second),
            data.limits.subjects,
            models,
            compile_profiles(data.sanitizers.profiles),
            compile_outputs(data.outputs.profiles),
            data.node.explain_denials,
        )

    def limit_for(self, principal: Principal, model: str = "") -> str:
        """Return the name of the limit that a request is admitted by, before any decision.

        It is the subject's own, else the model's, else the most generous that a role may have: no narrower than what the decision
        will name, which then counts besides.
        """
        own = self.subject_limits.get(principal.kind, {}).get(principal.id)
        return own or self.model_limits.get(model) or self.default_limit

    def sanitizer(self, decided: str | None, manifest: ModelManifest) -> Profile:
        """Return the profile: the decision's, else the manifest's, else the default for its modality.

        Raises:
            PolicyError: there is none of that name.
        """
        name = decided or manifest.sanitizer or (IMAGE_DEFAULT if manifest.image else TENSOR_DEFAULT)
        try:
            return self.sanitizers[name]
        except KeyError:
            raise PolicyError(f"there is no sanitizer profile {name!r}") from None

    def output(self, decided: str | None, manifest: ModelManifest) -> OutputProfile:
        """Return the output profile: the decision's, else the manifest's, else the whole output.

        Raises:
            PolicyError: there is none of that name.
        """
        name = decided or manifest.output_profile or FULL_OUTPUT
        try:
            return self.outputs[name]
        except KeyError:
            raise PolicyError(f"there is no output profile {name!r}") from None
