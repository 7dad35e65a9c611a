"""From a request's tensors to what the session gets: pictures are decoded, sanitized and scaled, numbers are checked and clamped.

Rules:

1. An image model's picture input takes either ``BYTES`` elements that hold JPEG or PNG, or the model's own tensor. Both pass the same steps.
2. Every other input passes the profile's steps for numbers, within the range that the manifest states.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agent.guard.images import decode_images
from agent.guard.sanitize import PixelScale, Profile
from agent.inference.manifest import ImageModality, ModelManifest, TensorModality
from agent.inference.preprocess import image_tensor
from agent.inference.tensors import Tensor

__all__ = ["sanitize_inputs"]


def sanitize_inputs(
    profile: Profile,
    manifest: ModelManifest,
    inputs: Mapping[str, Tensor],
    *,
    generator: np.random.Generator,
    latency_us: dict[str, int],
) -> dict[str, Tensor]:
    """Return the session's inputs; adds the time of each step to ``latency_us`` as ``sanitize.<step>``.

    Raises:
        PeerError: 400 or 413, for a picture or numbers that are refused.
        PolicyError: the profile does not fit the model.
    """
    image = manifest.image
    ranges = manifest.modality.ranges if isinstance(manifest.modality, TensorModality) else {}
    sanitized: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        where = f"inputs[{name}]"
        if image is not None and name == image.input:
            sanitized[name] = _pictures(profile, image, manifest, tensor, generator=generator, latency_us=latency_us)
            continue
        limits = ranges.get(name)
        done = profile.tensor(tensor, where, (limits.low, limits.high) if limits else (None, None))
        _add(latency_us, done.steps_us)
        sanitized[name] = done.value
    return sanitized


def _pictures(
    profile: Profile,
    image: ImageModality,
    manifest: ModelManifest,
    tensor: Tensor,
    *,
    generator: np.random.Generator,
    latency_us: dict[str, int],
) -> Tensor:
    where = f"inputs[{image.input}]"
    if not tensor.dtype.hasobject:
        scale = PixelScale(
            layout=image.layout, color=image.color, low=image.low, high=image.high, mean=image.mean, std=image.std
        )
        done = profile.picture_tensor(tensor, where, scale, generator)
        _add(latency_us, done.steps_us)
        return done.value
    pictures = []
    for pixels in decode_images([bytes(element) for element in tensor.flat], where):
        done = profile.picture(pixels, generator)
        _add(latency_us, done.steps_us)
        pictures.append(done.value)
    spec = manifest.input_spec(image.input)
    return image_tensor(image, spec.datatype if spec else "FP32", pictures)


def _add(latency_us: dict[str, int], steps_us: Mapping[str, int]) -> None:
    for step, micros in steps_us.items():
        key = f"sanitize.{step}"
        latency_us[key] = latency_us.get(key, 0) + micros
