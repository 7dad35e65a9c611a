"""From a request's tensors to the session's inputs."""

import io

import numpy as np
import pytest
from PIL import Image

from agent.errors import PeerError, PolicyError
from agent.flows.sanitizing import sanitize_inputs
from agent.guard.profiles import validate_sanitizers
from agent.guard.sanitize import compile_profile
from agent.inference.manifest import ImageModality, ModelManifest, Range, TensorModality
from agent.records import TensorSpec

_SPECS = validate_sanitizers(
    {
        "picture": {"steps": [{"step": "jpeg", "quality": 75}, {"step": "median", "size": 3}]},
        "numbers": {"steps": [{"step": "finite"}, {"step": "clamp", "low": None, "high": None}]},
        "none": {"steps": []},
    }
)
PROFILES = {name: compile_profile(spec) for name, spec in _SPECS.items()}
PICTURE = ModelManifest(
    "m",
    "1",
    (TensorSpec("x", "FP32", (-1, 3, 8, 8)), TensorSpec("scale", "FP32", (-1,))),
    (),
    modality=ImageModality("x", "NCHW", height=8, width=8),
)
NUMBERS = ModelManifest("m", "1", (), (), modality=TensorModality(ranges={"a": Range(-1.0, 1.0)}))


def sanitize(profile, manifest, **inputs):
    latency: dict[str, int] = {}
    generator = np.random.default_rng(1)
    done = sanitize_inputs(PROFILES[profile], manifest, inputs, generator=generator, latency_us=latency)
    return done, latency


def picture(fill=200):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (fill, 0, 0)).save(buffer, "PNG")
    tensor = np.empty(1, dtype=object)
    tensor[0] = buffer.getvalue()
    return tensor


def test_pictures_become_the_models_tensor():
    """Encoded pictures are decoded, pass every step and are scaled to the model's layout; each step's time is told."""
    done, latency = sanitize("picture", PICTURE, x=np.concatenate([picture(), picture(0)]))
    assert done["x"].shape == (2, 3, 8, 8)
    assert done["x"].dtype == np.float32
    assert done["x"][0, 0].mean() == pytest.approx(200 / 255, abs=0.05)
    assert set(latency) == {"sanitize.jpeg", "sanitize.median"}


def test_the_models_own_tensor_passes_the_same_steps():
    """A tensor instead of a picture is no way around the sanitizer."""
    noise = np.random.default_rng(3).random((1, 3, 8, 8), dtype=np.float32)
    done, latency = sanitize("picture", PICTURE, x=noise)
    assert done["x"].shape == noise.shape
    assert not np.array_equal(done["x"], noise)
    assert set(latency) == {"sanitize.jpeg", "sanitize.median"}
    plain, _ = sanitize("none", PICTURE, x=noise)
    np.testing.assert_allclose(plain["x"], noise, atol=0.01)


def test_numbers_are_held_to_the_manifests_range():
    """A value outside the range is clamped, an input without a range keeps its values."""
    wild = np.array([-5.0, 0.5, 5.0], np.float32)
    done, latency = sanitize("numbers", NUMBERS, a=wild, b=wild)
    assert done["a"].tolist() == [-1.0, 0.5, 1.0]
    assert done["b"].tolist() == wild.tolist()
    assert set(latency) == {"sanitize.finite", "sanitize.clamp"}


def test_what_is_refused_is_the_callers():
    """NaN where the profile wants finite numbers, and octets that are no picture, are 400 and say where."""
    with pytest.raises(PeerError, match=r"inputs\[a\]"):
        sanitize("numbers", NUMBERS, a=np.array([np.nan], np.float32))
    broken = np.empty(1, dtype=object)
    broken[0] = b"no picture"
    with pytest.raises(PeerError, match=r"inputs\[x\]"):
        sanitize("picture", PICTURE, x=broken)


def test_a_profile_that_does_not_fit_is_ours():
    """Steps for pictures on numbers are an error of the policy, not of the caller."""
    with pytest.raises(PolicyError):
        sanitize("picture", NUMBERS, a=np.zeros(3, np.float32))
