"""Output profiles of the policy's data: how much of a model's answer leaves the node.

Rules:

1. ``decimals`` rounds every float output.
2. ``top_k`` and ``labels_only`` turn each output of class scores, ``[..., classes]`` of floats, into the k best as texts
   ``[..., k]``: ``score:index:label``, as the classification extension of the protocol writes them, or the label alone
   (the index, for a model without labels). Best first; of equal scores the lower index; NaN last.
3. Under such a profile an output that is no class scores (another datatype, or another count than the labels) is withheld.
   If nothing is left, the profile does not fit the model: a PolicyError, and no answer.

Rounding and cutting hide detail from an honest reader and slow an attack on privacy; they do not stop the extraction of a
model (its lifetime budget does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from agent.errors import PolicyError

__all__ = ["MAX_DECIMALS", "MAX_TOP_K", "OutputProfile", "compile_output", "compile_outputs"]

MAX_TOP_K = 1000
MAX_DECIMALS = 15
_EXACT = 2.0**53  # up to here a double holds every integer

Tensor: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class OutputProfile:
    """A compiled profile; use :func:`compile_output`. None of its members set: everything leaves as it is."""

    name: str
    top_k: int | None = None
    decimals: int | None = None
    labels_only: bool = False

    def apply(self, outputs: Mapping[str, Tensor], labels: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return what may leave.

        Args:
            outputs: the model's outputs.
            labels: the model's labels in the order of its classes.

        Raises:
            PolicyError: the profile wants classes, and no output has them.
        """
        if self.top_k is None:
            return {name: self._rounded(tensor) for name, tensor in outputs.items()}
        best = {
            name: self._best(tensor, self.top_k, labels)
            for name, tensor in outputs.items()
            if tensor.dtype.kind == "f"
            and tensor.ndim
            and tensor.shape[-1] == (len(labels) if labels else tensor.shape[-1])
        }
        if not best:
            raise PolicyError(f"output profile {self.name!r} wants class scores, and no output of the model has them")
        return best

    def _rounded(self, tensor: Tensor) -> Tensor:
        if self.decimals is None or tensor.dtype.kind != "f":
            return tensor
        # In double precision, so that the nearest short decimal is found; then back to the output's own type. A value past
        # the last decimal that the precision holds has nothing to round, and would overflow on the way.
        values = tensor.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = np.round(values, self.decimals)
        return np.where(np.abs(values) < _EXACT / 10**self.decimals, rounded, values).astype(tensor.dtype)

    def _best(self, tensor: Tensor, count: int, labels: Sequence[str] | None) -> Tensor:
        order = np.argsort(-tensor, axis=-1, kind="stable")[..., :count]
        scores = np.take_along_axis(tensor, order, axis=-1)
        texts = (self._text(score, int(index), labels) for score, index in zip(scores.flat, order.flat, strict=True))
        return np.fromiter(texts, object, order.size).reshape(order.shape)

    def _text(self, score: Any, index: int, labels: Sequence[str] | None) -> bytes:  # noqa: ANN401 -- a numpy scalar
        label = labels[index] if labels else ""
        if self.labels_only:
            return (label or str(index)).encode()
        number = str(score) if self.decimals is None else f"{score:.{self.decimals}f}"
        return (f"{number}:{index}:{label}" if label else f"{number}:{index}").encode()


def compile_outputs(profiles: Mapping[str, Any]) -> dict[str, OutputProfile]:
    """Compile ``data.outputs.profiles``: name to ``{description, top_k, decimals, labels_only}``, all optional.

    Raises:
        PolicyError: names the profile and what is wrong.
    """
    return {name: compile_output(name, profile) for name, profile in profiles.items()}


def compile_output(name: str, profile: Any) -> OutputProfile:  # noqa: ANN401 -- it is checked here
    """Compile one profile.

    Raises:
        PolicyError: names the profile and what is wrong.
    """
    where = f"output profile {name!r}"
    if not isinstance(profile, Mapping) or not profile.keys() <= {"description", "top_k", "decimals", "labels_only"}:
        raise PolicyError(f"{where}: may have description, top_k, decimals and labels_only only")
    labels_only = profile.get("labels_only", False)
    if not isinstance(labels_only, bool):
        raise PolicyError(f"{where}: labels_only must be a boolean")
    top_k = _integer(profile, "top_k", 1, MAX_TOP_K, where)
    if labels_only and top_k is None:
        top_k = 1
    return OutputProfile(name, top_k, _integer(profile, "decimals", 0, MAX_DECIMALS, where), labels_only)


def _integer(profile: Mapping[str, Any], name: str, low: int, high: int, where: str) -> int | None:
    value = profile.get(name)
    if name in profile and (type(value) is not int or not low <= value <= high):
        raise PolicyError(f"{where}: {name} must be an integer from {low} to {high}")
    return value
