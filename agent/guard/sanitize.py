"""Sanitizer profiles, compiled once and applied to a model's inputs.

Rules:

1. A profile comes validated (``profiles``); here each of its steps becomes a function on arrays.
2. Decoded pictures get the picture steps: their values are finite and in range by nature. Tensors get the number steps; a
   profile with picture steps on a model that takes no pictures is a PolicyError: what was asked for can't be done.
3. A picture that a client sends as an already normalized tensor is brought back to pixels (:class:`PixelScale`),
   sanitized as one, and normalized again; so it may not hold NaN or infinities, whatever the profile says. An empty
   profile leaves every bit as it was.
4. Random choices come from the caller's generator (:func:`new_generator`), seeded by the system: what an attacker could
   predict would be no defence.

Each result carries the time of every step in microseconds, for the latency split.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from agent.arrays import all_finite
from agent.clock import monotonic_us
from agent.errors import PeerError, PolicyError
from agent.guard.filters import dct_low_pass, jpeg, median3
from agent.guard.images import Pixels
from agent.guard.profiles import Clamp, Dct, Finite, Jpeg, Median, PictureStep, SanitizerSpec, TensorStep

__all__ = ["PixelScale", "Profile", "Sanitized", "compile_profile", "new_generator"]

MAX_SIDE = 8192  # pixels of a picture sent as a tensor; JPEG itself ends at 65,535

Tensor: TypeAlias = npt.NDArray[Any]
Range: TypeAlias = tuple[float | None, float | None]
# Grey in is grey out: JPEG keeps neutral colors neutral, so that any of the three channels is the grey one.
_CHANNELS = {"RGB": slice(None), "BGR": slice(None, None, -1), "GRAY": slice(1)}
_PictureFunction: TypeAlias = Callable[[Pixels, np.random.Generator], Pixels]
_TensorFunction: TypeAlias = Callable[[Tensor, Range, str], Tensor]


def new_generator() -> np.random.Generator:
    """Return a random generator that the system's entropy seeded."""
    return np.random.Generator(np.random.PCG64(secrets.randbits(128)))


class Sanitized(msgspec.Struct, frozen=True):
    """A sanitized input, and the microseconds of each step by its name."""

    value: Tensor
    steps_us: dict[str, int]


@dataclass(frozen=True, slots=True)
class PixelScale:
    """How a picture's pixels became numbers: ``(low + pixel / 255 * (high - low) - mean) / std`` by channel.

    ``mean`` and ``std`` have one value, or one for each channel in the order of ``color``.
    """

    layout: Literal["NCHW", "NHWC"]
    color: Literal["RGB", "BGR", "GRAY"] = "RGB"
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to_pixels(self, tensor: Tensor, where: str) -> Pixels:
        """Return a batch of pictures ``[N, height, width, 3]`` in RGB, rounded to the nearest pixel value.

        Raises:
            PeerError: 400, when the tensor is not such a batch or holds NaN or infinities.
        """
        channels = 1 if self.color == "GRAY" else 3
        batch = tensor.transpose(0, 2, 3, 1) if self.layout == "NCHW" and tensor.ndim == len(self.layout) else tensor
        if (
            batch.ndim != len(self.layout)
            or batch.shape[3] != channels
            or not all(0 < n <= MAX_SIDE for n in batch.shape)
        ):
            raise PeerError(
                400, "image", f"{where}: not {self.layout} with {channels} channels and sides up to {MAX_SIDE}"
            )
        if batch.dtype != np.uint8:
            if batch.dtype.kind != "f":
                raise PeerError(400, "image", f"{where}: a picture holds floats or UINT8")
            if not all_finite(batch):
                raise _not_finite(where)
            scale = np.array(self.std) * 255 / (self.high - self.low)
            bias = (np.array(self.mean) - self.low) * 255 / (self.high - self.low)
            # Far values of a 16-bit float would overflow; of a 32-bit float they end at the clip as infinities.
            with np.errstate(over="ignore"):
                values = np.multiply(batch, scale.astype(np.float32), dtype=np.float32) + bias.astype(np.float32)
            batch = np.clip(np.rint(values, out=values), 0, 255, out=values).astype(np.uint8)
        match self.color:
            case "RGB":
                return batch
            case "BGR":
                return batch[..., ::-1]
            case "GRAY":
                return np.repeat(batch, 3, axis=3)

    def to_tensor(self, pixels: Pixels, dtype: np.dtype[Any]) -> Tensor:
        """Return the tensor ``[N, ...]`` of a batch of pictures ``[N, height, width, 3]`` in RGB."""
        batch: Tensor = pixels[..., _CHANNELS[self.color]]
        if dtype != np.uint8:
            std = np.array(self.std)
            scale = ((self.high - self.low) / 255 / std).astype(np.float32)
            batch = np.multiply(batch, scale, dtype=np.float32) + ((self.low - np.array(self.mean)) / std).astype(
                np.float32
            )
        if self.layout == "NCHW":
            batch = batch.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(batch, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Profile:
    """A compiled profile; use :func:`compile_profile`."""

    name: str
    tensor_steps: tuple[tuple[str, _TensorFunction], ...]
    picture_steps: tuple[tuple[str, _PictureFunction], ...]

    def picture(self, pixels: Pixels, generator: np.random.Generator) -> Sanitized:
        """Sanitize one decoded picture ``[height, width, 3]``, uint8, RGB."""
        return self._pictures(pixels[np.newaxis], generator, {}, first_only=True)

    def tensor(self, tensor: Tensor, where: str, value_range: Range = (None, None)) -> Sanitized:
        """Sanitize numbers; texts (BYTES) pass as they are.

        Args:
            tensor: an input that is no picture.
            where: its place in the request, for errors.
            value_range: least and greatest value by the model's manifest; None where it states none.

        Raises:
            PeerError: 400, from ``finite``.
            PolicyError: the profile has steps for pictures.
        """
        if self.picture_steps:
            raise PolicyError(f"sanitizer {self.name!r} has steps for pictures, and the input {where} is none")
        return self._numbers(tensor, where, value_range)

    def picture_tensor(
        self, tensor: Tensor, where: str, scale: PixelScale, generator: np.random.Generator
    ) -> Sanitized:
        """Sanitize pictures that were sent as a tensor of the model's own form.

        Raises:
            PeerError: 400, for another shape than the model's layout has, or for NaN and infinities.
        """
        numbers = self._numbers(tensor, where, (None, None))
        if not self.picture_steps:
            return numbers
        pixels = scale.to_pixels(numbers.value, where)
        pictures = self._pictures(pixels, generator, numbers.steps_us)
        return Sanitized(scale.to_tensor(pictures.value, tensor.dtype), pictures.steps_us)

    def _numbers(self, tensor: Tensor, where: str, value_range: Range) -> Sanitized:
        steps_us: dict[str, int] = {}
        if not tensor.dtype.hasobject:
            mark = monotonic_us()
            for name, step in self.tensor_steps:
                tensor = step(tensor, value_range, where)
                now = monotonic_us()
                steps_us[name] = steps_us.get(name, 0) + now - mark
                mark = now
        return Sanitized(tensor, steps_us)

    def _pictures(
        self, pixels: Pixels, generator: np.random.Generator, steps_us: dict[str, int], *, first_only: bool = False
    ) -> Sanitized:
        pictures = list(pixels)
        for name, step in self.picture_steps:
            start = monotonic_us()
            pictures = [step(picture, generator) for picture in pictures]
            steps_us[name] = steps_us.get(name, 0) + monotonic_us() - start
        return Sanitized(pictures[0] if first_only else np.stack(pictures), steps_us)


# --- compiling


def compile_profile(spec: SanitizerSpec) -> Profile:
    """Turn a validated profile into functions."""
    return Profile(
        spec.name,
        tuple(_tensor_function(step) for step in spec.tensor_steps),
        tuple(_picture_function(step) for step in spec.picture_steps),
    )


def _tensor_function(step: TensorStep) -> tuple[str, _TensorFunction]:
    match step:
        case Finite():
            return "finite", _finite
        case Clamp(low, high):
            return "clamp", _clamp(low, high)


def _picture_function(step: PictureStep) -> tuple[str, _PictureFunction]:
    match step:
        case Dct(keep):
            return "dct", _fixed(dct_low_pass(keep))
        case Median():
            return "median", _fixed(median3)
        case Jpeg(low, high) if low == high:
            return "jpeg", lambda pixels, _: jpeg(pixels, low)
        case Jpeg(low, high):
            return "jpeg", lambda pixels, generator: jpeg(pixels, int(generator.integers(low, high, endpoint=True)))


def _fixed(function: Callable[[Pixels], Pixels]) -> _PictureFunction:
    return lambda pixels, _: function(pixels)


def _finite(tensor: Tensor, _: Range, where: str) -> Tensor:
    if tensor.dtype.kind == "f" and not all_finite(tensor):
        raise _not_finite(where)
    return tensor


def _clamp(own_low: float | None, own_high: float | None) -> _TensorFunction:
    def clamp(tensor: Tensor, value_range: Range, _: str) -> Tensor:
        low = value_range[0] if own_low is None else own_low
        high = value_range[1] if own_high is None else own_high
        return _clip(tensor, low, high)

    return clamp


def _clip(tensor: Tensor, low: float | None, high: float | None) -> Tensor:
    if tensor.dtype.kind == "b" or (low is None and high is None):
        return tensor
    # In Python's numbers: a bound beyond what the type can hold bounds nothing, and in the type itself it would overflow.
    if tensor.dtype.kind == "f":
        type_low, type_high = float(np.finfo(tensor.dtype).min), float(np.finfo(tensor.dtype).max)
        rounded = low, high
    else:
        type_low, type_high = np.iinfo(tensor.dtype).min, np.iinfo(tensor.dtype).max
        rounded = None if low is None else math.ceil(low), None if high is None else math.floor(high)
    least, greatest = (None if bound is None else min(max(bound, type_low), type_high) for bound in rounded)
    return np.clip(tensor, least, greatest)


def _not_finite(where: str) -> PeerError:
    return PeerError(400, "not_finite", f"{where}: holds NaN or infinities")
