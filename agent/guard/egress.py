"""Output profiles, applied: how much of a model's answer leaves the node.

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
from agent.guard.profiles import OutputSpec

__all__ = ["OutputProfile"]

_EXACT = 2.0**53  # up to here a double holds every integer

Tensor: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class OutputProfile:
    """A validated profile, and what it does to outputs."""

    spec: OutputSpec

    @property
    def name(self) -> str:
        """Its name in the policy's data."""
        return self.spec.name

    def apply(self, outputs: Mapping[str, Tensor], labels: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return what may leave.

        Args:
            outputs: the model's outputs.
            labels: the model's labels in the order of its classes.

        Raises:
            PolicyError: the profile wants classes, and no output has them.
        """
        if self.spec.top_k is None:
            return {name: self._rounded(tensor) for name, tensor in outputs.items()}
        best = {
            name: self._best(tensor, self.spec.top_k, labels)
            for name, tensor in outputs.items()
            if tensor.dtype.kind == "f"
            and tensor.ndim
            and tensor.shape[-1] == (len(labels) if labels else tensor.shape[-1])
        }
        if not best:
            raise PolicyError(f"output profile {self.name!r} wants class scores, and no output of the model has them")
        return best

    def _rounded(self, tensor: Tensor) -> Tensor:
        if self.spec.decimals is None or tensor.dtype.kind != "f":
            return tensor
        # In double precision, so that the nearest short decimal is found; then back to the output's own type. A value past
        # the last decimal that the precision holds has nothing to round, and would overflow on the way.
        values = tensor.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = np.round(values, self.spec.decimals)
        return np.where(np.abs(values) < _EXACT / 10**self.spec.decimals, rounded, values).astype(tensor.dtype)

    def _best(self, tensor: Tensor, count: int, labels: Sequence[str] | None) -> Tensor:
        order = np.argsort(-tensor, axis=-1, kind="stable")[..., :count]
        scores = np.take_along_axis(tensor, order, axis=-1)
        texts = (self._text(score, int(index), labels) for score, index in zip(scores.flat, order.flat, strict=True))
        return np.fromiter(texts, object, order.size).reshape(order.shape)

    def _text(self, score: Any, index: int, labels: Sequence[str] | None) -> bytes:  # noqa: ANN401 -- a numpy scalar
        label = labels[index] if labels else ""
        if self.spec.labels_only:
            return (label or str(index)).encode()
        number = str(score) if self.spec.decimals is None else f"{score:.{self.spec.decimals}f}"
        return (f"{number}:{index}:{label}" if label else f"{number}:{index}").encode()
