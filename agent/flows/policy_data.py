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

AREAS: Final = ("limits", "sanitizers", "outputs", "node")
IMAGE_DEFAULT: Final = "image-default"
TENSOR_DEFAULT: Final = "tensor-default"
FULL_OUTPUT: Final = "full"


@dataclass(frozen=True, slots=True)
class PolicyData:
    """Compiled data. An empty one (before the first activation) refuses everything: it has no limit to admit by."""

    policy_sha256: str = ""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    default_limit: str = ""
    subject_limits: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by kind of proof, by id
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
            data: dict[str, Any] = msgspec.json.decode(document, type=dict[str, dict[str, Any]])
            limits = compile_limits(data["limits"]["limits"])
            default = data["limits"]["default"]
            subjects = msgspec.convert(data["limits"].get("subjects", {}), dict[str, dict[str, str]])
            sanitizers = compile_profiles(data["sanitizers"]["profiles"])
            outputs = compile_outputs(data["outputs"]["profiles"])
            explain = data.get("node", {}).get("explain_denials", False)
        except (msgspec.DecodeError, KeyError, AttributeError) as error:
            raise PolicyError(f"policy data: {error} is missing or malformed") from error
        for name in (default, *(name for kind in subjects.values() for name in kind.values())):
            if name not in limits:
                raise PolicyError(f"policy data: limits: there is no limit {name!r}")
        if not isinstance(explain, bool):
            raise PolicyError("policy data: node.explain_denials must be a boolean")
        return cls(policy_sha256, limits, default, subjects, sanitizers, outputs, explain)

    def limit_for(self, principal: Principal) -> str:
        """Return the name of the limit that a principal is admitted by, before any decision."""
        return self.subject_limits.get(principal.kind, {}).get(principal.id, self.default_limit)

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
