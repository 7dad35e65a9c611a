"""Sanitizer and output profiles of the policy's data, validated: what is to be done, and nothing that does it.

Rules:

1. A sanitizer profile is a list of at most :data:`MAX_STEPS` steps, each with exactly its own members: ``finite``, ``clamp`` (for
   numbers), then ``dct``, ``median``, ``jpeg`` (for pictures). What is unknown, out of range or out of this order is a
   PolicyError when the policy is activated, never a surprise during a request.
2. An output profile has ``top_k``, ``decimals`` and ``labels_only``, each optional, and no other member.
3. Nothing here works on arrays. The agent validates a policy with this module alone; ``sanitize`` and ``egress`` turn what it
   returns into functions, in the gateway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from agent.errors import PolicyError

__all__ = [
    "MAX_DECIMALS",
    "MAX_STEPS",
    "MAX_TOP_K",
    "Clamp",
    "Dct",
    "Finite",
    "Jpeg",
    "Median",
    "OutputSpec",
    "PictureStep",
    "SanitizerSpec",
    "TensorStep",
    "validate_output",
    "validate_outputs",
    "validate_sanitizer",
    "validate_sanitizers",
]

MAX_STEPS = 16
MAX_TOP_K = 1000
MAX_DECIMALS = 15


@dataclass(frozen=True, slots=True)
class Finite:
    """Refuse NaN and infinities."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """Bring numbers between two bounds; None is the bound of the model's manifest."""

    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Dct:
    """Keep the ``keep`` lowest frequencies of each axis of a block."""

    keep: int


@dataclass(frozen=True, slots=True)
class Median:
    """The median of 3 by 3 pixels, the one size there is."""


@dataclass(frozen=True, slots=True)
class Jpeg:
    """Encode and decode, at a quality drawn from this range, both ends included."""

    quality_min: int
    quality_max: int


TensorStep: TypeAlias = Finite | Clamp
PictureStep: TypeAlias = Dct | Median | Jpeg


@dataclass(frozen=True, slots=True)
class SanitizerSpec:
    """A sanitizer profile: its steps for numbers, then those for pictures."""

    name: str
    tensor_steps: tuple[TensorStep, ...] = ()
    picture_steps: tuple[PictureStep, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output profile. None of its members set: everything leaves as it is."""

    name: str
    top_k: int | None = None
    decimals: int | None = None
    labels_only: bool = False


# --- sanitizers


def validate_sanitizers(profiles: Mapping[str, Any]) -> dict[str, SanitizerSpec]:
    """Validate ``data.sanitizers.profiles``: name to ``{description, steps}``.

    Raises:
        PolicyError: names the profile, the step and what is wrong.
    """
    valid: dict[str, SanitizerSpec] = {}
    for name, profile in profiles.items():
        if not isinstance(profile, Mapping) or not {"steps"} <= profile.keys() <= {"steps", "description"}:
            raise PolicyError(f"sanitizer {name!r}: must have steps, and may have a description")
        valid[name] = validate_sanitizer(name, profile["steps"])
    return valid


def validate_sanitizer(name: str, steps: Sequence[Any]) -> SanitizerSpec:
    """Validate a list of steps.

    Raises:
        PolicyError: names the profile, the step and what is wrong.
    """
    if not isinstance(steps, list | tuple) or len(steps) > MAX_STEPS:
        raise PolicyError(f"sanitizer {name!r}: steps must be a list of at most {MAX_STEPS}")
    tensor_steps: list[TensorStep] = []
    picture_steps: list[PictureStep] = []
    for index, step in enumerate(steps):
        where = f"sanitizer {name!r}: steps[{index}]"
        if not isinstance(step, Mapping):
            raise PolicyError(f"{where}: must be an object")
        options = {key: value for key, value in step.items() if key != "step"}
        match step.get("step"):
            case "finite" | "clamp" if picture_steps:
                raise PolicyError(f"{where}: steps for numbers stand before steps for pictures")
            case "finite":
                _members(options, set(), where)
                tensor_steps.append(Finite())
            case "clamp":
                tensor_steps.append(_clamp(options, where))
            case "dct":
                _members(options, {"keep"}, where)
                picture_steps.append(Dct(_integer(options, "keep", 1, 8, where)))
            case "median":
                _members(options, {"size"}, where)
                _integer(options, "size", 3, 3, where)
                picture_steps.append(Median())
            case "jpeg":
                picture_steps.append(_jpeg(options, where))
            case _:
                raise PolicyError(f"{where}: unknown step; known are finite, clamp, dct, median and jpeg")
    return SanitizerSpec(name, tuple(tensor_steps), tuple(picture_steps))


def _jpeg(options: Mapping[str, Any], where: str) -> Jpeg:
    if "quality" in options:
        _members(options, {"quality"}, where)
        quality = _integer(options, "quality", 1, 100, where)
        return Jpeg(quality, quality)
    _members(options, {"quality_min", "quality_max"}, where)
    low = _integer(options, "quality_min", 1, 100, where)
    return Jpeg(low, _integer(options, "quality_max", low, 100, where))


def _clamp(options: Mapping[str, Any], where: str) -> Clamp:
    _members(options, {"low", "high"}, where)
    low, high = options["low"], options["high"]
    for bound in (low, high):
        if bound is not None and (
            isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound)
        ):
            raise PolicyError(f"{where}: low and high must be finite numbers, or null for the manifest's")
    if low is not None and high is not None and low > high:
        raise PolicyError(f"{where}: low is greater than high")
    return Clamp(low, high)


# --- outputs


def validate_outputs(profiles: Mapping[str, Any]) -> dict[str, OutputSpec]:
    """Validate ``data.outputs.profiles``: name to ``{description, top_k, decimals, labels_only}``, all optional.

    Raises:
        PolicyError: names the profile and what is wrong.
    """
    return {name: validate_output(name, profile) for name, profile in profiles.items()}


def validate_output(name: str, profile: Any) -> OutputSpec:  # noqa: ANN401 -- it is checked here
    """Validate one profile.

    Raises:
        PolicyError: names the profile and what is wrong.
    """
    where = f"output profile {name!r}"
    if not isinstance(profile, Mapping) or not profile.keys() <= {"description", "top_k", "decimals", "labels_only"}:
        raise PolicyError(f"{where}: may have description, top_k, decimals and labels_only only")
    labels_only = profile.get("labels_only", False)
    if not isinstance(labels_only, bool):
        raise PolicyError(f"{where}: labels_only must be a boolean")
    top_k = _integer(profile, "top_k", 1, MAX_TOP_K, where) if "top_k" in profile else None
    if labels_only and top_k is None:
        top_k = 1
    decimals = _integer(profile, "decimals", 0, MAX_DECIMALS, where) if "decimals" in profile else None
    return OutputSpec(name, top_k, decimals, labels_only)


# --- members


def _members(options: Mapping[str, Any], names: set[str], where: str) -> None:
    if options.keys() != names:
        raise PolicyError(f"{where}: must have exactly the members {sorted({'step', *names})}")


def _integer(options: Mapping[str, Any], name: str, low: int, high: int, where: str) -> int:
    value = options[name]
    if type(value) is not int or not low <= value <= high:
        raise PolicyError(f"{where}: {name} must be an integer from {low} to {high}")
    return value
