"""The part of the policy's data that the gateway enforces itself, compiled: limits, sanitizers, output profiles.

A decision names a limit, a sanitizer or an output profile; what the name means is compiled here once, at activation, from the validated
document (``policy_document``). A name that the data does not have is an error, and an error is a refusal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.errors import PolicyError
from agent.flows.policy_document import PolicyDocument
from agent.guard.admission import Limit
from agent.guard.egress import OutputProfile
from agent.guard.sanitize import Profile, compile_profile
from agent.inference.manifest import ModelManifest
from agent.records import Principal

__all__ = ["PolicyData"]

IMAGE_DEFAULT: Final = "image-default"
TENSOR_DEFAULT: Final = "tensor-default"
FULL_OUTPUT: Final = "full"


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
        """Validate and compile the areas of a bundle's data, as JSON.

        Raises:
            PolicyError: an area is missing or malformed.
        """
        valid = PolicyDocument.parse(document)
        return cls(
            policy_sha256,
            valid.limits,
            valid.default_limit,
            valid.subject_limits,
            valid.model_limits,
            {name: compile_profile(spec) for name, spec in valid.sanitizers.items()},
            {name: OutputProfile(spec) for name, spec in valid.outputs.items()},
            valid.explain_denials,
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
