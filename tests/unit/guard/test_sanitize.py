"""Sanitizer profiles, applied in order, to pictures and to numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import PeerError, PolicyError
from agent.guard.filters import dct_low_pass, jpeg, median3
from agent.guard.profiles import validate_sanitizer
from agent.guard.sanitize import PixelScale, compile_profile, new_generator
from tests.support.outcome import value_or_refusal

_IMAGE = np.random.default_rng(5).integers(0, 256, (16, 24, 3)).astype(np.uint8)
_SCALES = [
    PixelScale("NCHW", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    PixelScale("NHWC", "BGR", low=-1.0, high=1.0),
    PixelScale("NHWC", "RGB", low=0.0, high=255.0, mean=(103.9, 116.8, 123.7)),
    PixelScale("NCHW", "GRAY", mean=(0.5,), std=(0.5,)),
]


def _compile(*steps):
    return compile_profile(validate_sanitizer("test", steps))


def _generator(seed=1):
    return np.random.default_rng(seed)


def test_steps_run_in_the_order_of_the_profile():
    """The result is that of the filters one after the other, and each has its time."""
    done = _compile({"step": "jpeg", "quality": 75}, {"step": "median", "size": 3}, {"step": "dct", "keep": 6}).picture(
        _IMAGE, _generator()
    )
    assert np.array_equal(done.value, dct_low_pass(6)(median3(jpeg(_IMAGE, 75))))
    assert list(done.steps_us) == ["jpeg", "median", "dct"]
    assert all(type(duration) is int and duration >= 0 for duration in done.steps_us.values())


def test_an_empty_profile_changes_nothing():
    """Also not the bits of a picture that was sent as a tensor, nor its NaN."""
    tensor = np.full((1, 3, 4, 4), np.nan, np.float32)
    profile = _compile()
    assert np.array_equal(profile.picture(_IMAGE, _generator()).value, _IMAGE)
    assert profile.picture_tensor(tensor, "x", _SCALES[0], _generator()).value is tensor
    assert profile.tensor(tensor, "x").value is tensor


def test_a_random_quality_is_drawn_for_each_picture_from_the_whole_range():
    """Every quality of the range occurs, none outside; the caller's generator decides."""
    profile = _compile({"step": "jpeg", "quality_min": 60, "quality_max": 62})
    possible = {quality: jpeg(_IMAGE, quality).tobytes() for quality in range(55, 70)}
    generator = _generator()
    seen = {profile.picture(_IMAGE, generator).value.tobytes() for _ in range(60)}
    assert seen == {possible[quality] for quality in (60, 61, 62)}
    assert np.array_equal(profile.picture(_IMAGE, _generator(4)).value, profile.picture(_IMAGE, _generator(4)).value)


def test_a_new_generator_cannot_be_guessed_from_another():
    """Two generators of the system's entropy differ."""
    assert new_generator().integers(0, 2**63) != new_generator().integers(0, 2**63)


# --- pictures as tensors


@pytest.mark.parametrize("scale", _SCALES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_pixel_value_survives_the_way_back_and_forth(scale, dtype):
    """Normalizing and bringing back gives each of the 256 values of each channel exactly."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    if scale.color != "GRAY":
        values = np.concatenate([values[..., :2], 255 - values[..., :1]], axis=3)
    tensor = scale.to_tensor(values, np.dtype(dtype))
    assert tensor.dtype == dtype
    assert tensor.flags.c_contiguous
    assert np.array_equal(scale.to_pixels(tensor, "x"), values)


@pytest.mark.parametrize("scale", _SCALES)
def test_a_picture_sent_as_a_tensor_is_sanitized_as_a_picture(scale):
    """The tensor that comes out is that of the sanitized pixels, for each picture of the batch."""
    batch = np.stack([_IMAGE, _IMAGE[::-1]])
    if scale.color == "GRAY":
        batch = batch[..., :1].repeat(3, axis=3)
    tensor = scale.to_tensor(batch, np.dtype(np.float32))
    done = _compile({"step": "jpeg", "quality": 60}, {"step": "median", "size": 3}).picture_tensor(
        tensor, "x", scale, _generator()
    )
    expected = scale.to_tensor(np.stack([median3(jpeg(picture, 60)) for picture in batch]), np.dtype(np.float32))
    assert np.array_equal(done.value, expected)
    assert done.value.shape == tensor.shape


def test_the_scale_is_the_formula_of_the_manifest():
    """(low + pixel / 255 * (high - low) - mean) / std, computed here by hand for one pixel."""
    scale = PixelScale("NHWC", low=-1, high=3, mean=(0.1, 0.2, 0.3), std=(2.0, 4.0, 5.0))
    tensor = scale.to_tensor(np.array([[[[0, 51, 255]]]], np.uint8), np.dtype(np.float64))
    assert tensor.reshape(-1).tolist() == pytest.approx([(-1 - 0.1) / 2, (-1 + 0.8 - 0.2) / 4, (3 - 0.3) / 5], abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_tensor_must_be_finite_even_without_that_step(value):
    """What is no pixel can't be sanitized as one."""
    tensor = np.zeros((1, 3, 4, 4), np.float32)
    tensor[0, 0, 1, 2] = value
    with pytest.raises(PeerError) as refusal:
        _compile({"step": "median", "size": 3}).picture_tensor(tensor, "inputs[0]", _SCALES[0], _generator())
    assert refusal.value.reason == "not_finite"


@pytest.mark.parametrize(
    "shape", [(3, 4, 4), (1, 1, 4, 4), (1, 4, 4, 3), (0, 3, 4, 4), (1, 3, 0, 4), (1, 3, 1, 9000), ()]
)
def test_a_tensor_that_is_no_batch_of_pictures_is_refused(shape):
    """Wrong rank, channels, empty and endless sides: 400."""
    with pytest.raises(PeerError) as refusal:
        _compile({"step": "median", "size": 3}).picture_tensor(
            np.zeros(shape, np.float32), "inputs[0]", _SCALES[0], _generator()
        )
    assert (refusal.value.status, refusal.value.reason) == (400, "image")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, object])
def test_a_picture_holds_floats_or_bytes(dtype):
    """Other numbers, and texts, are no pixels."""
    with pytest.raises(PeerError) as refusal:
        _SCALES[0].to_pixels(np.zeros((1, 3, 4, 4), dtype), "inputs[0]")
    assert (refusal.value.status, refusal.value.reason) == (400, "image")


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_, object]),
        hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    ),
    st.sampled_from(_SCALES),
)
def test_an_arbitrary_tensor_is_sanitized_in_its_form_or_refused(tensor, scale):
    """Extreme values end at the limits of a pixel; other tensors get 400; nothing else is raised."""
    profile = _compile({"step": "finite"}, {"step": "dct", "keep": 4}, {"step": "jpeg", "quality": 75})
    outcome = value_or_refusal(lambda: profile.picture_tensor(tensor, "x", scale, _generator()))
    if isinstance(outcome, PeerError):
        assert outcome.status == 400
    else:
        assert (outcome.value.shape, outcome.value.dtype) == (tensor.shape, tensor.dtype)
        assert np.isfinite(outcome.value).all()


# --- numbers


def test_finite_refuses_what_is_not():
    """NaN and both infinities, in any float type; integers and texts pass."""
    profile = _compile({"step": "finite"})
    for value in (np.nan, np.inf, -np.inf):
        for dtype in (np.float16, np.float32, np.float64):
            with pytest.raises(PeerError, match=r"inputs\[3\]"):
                profile.tensor(np.array([1, value], dtype), "inputs[3]")
    for tensor in (np.array([1.5]), np.array([2**63 - 1]), np.array([b"nan"], object)):
        assert profile.tensor(tensor, "x").value is tensor


@given(
    hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint16, np.int64]), st.integers(0, 6)),
    st.none() | st.integers(-300, 300),
    st.none() | st.integers(0, 10**6),
)
def test_clamp_brings_every_number_into_its_range(tensor, low, width):
    """Each element is the nearest number of the range that its type can hold; NaN stays, for finite to judge."""
    high = None if width is None else (low or 0) + width
    done = _compile({"step": "clamp", "low": low, "high": high}).tensor(tensor, "x").value
    assert done.dtype == tensor.dtype
    limits = np.iinfo(tensor.dtype) if tensor.dtype.kind in "iu" else np.finfo(tensor.dtype)
    smallest, largest = np.array(limits.min).item(), np.array(limits.max).item()
    least = smallest if low is None else max(min(low, largest), smallest)
    greatest = largest if high is None else max(min(high, largest), smallest)
    for before, after in zip(tensor.tolist(), done.tolist(), strict=True):
        if before != before:  # noqa: PLR0124 -- NaN
            assert after != after  # noqa: PLR0124 -- NaN
        elif (low is None and before == -np.inf) or (high is None and before == np.inf):
            assert after == before
        else:
            assert after == tensor.dtype.type(min(max(before, least), greatest))


def test_clamp_takes_the_manifests_range_where_it_has_none_itself():
    """A null bound is the model's; its own bound wins; without either nothing is bounded."""
    tensor = np.array([-5.0, 0.5, 5.0])
    profile = _compile({"step": "clamp", "low": None, "high": 2})
    assert profile.tensor(tensor, "x", (-1.0, 1.0)).value.tolist() == [-1, 0.5, 2]
    assert profile.tensor(tensor, "x").value.tolist() == [-5, 0.5, 2]
    assert profile.tensor(np.array([True]), "x", (-1.0, 1.0)).value.tolist() == [True]
    integers = np.array([-3, 0, 3], np.int8)
    assert _compile({"step": "clamp", "low": -1.5, "high": 1.5}).tensor(integers, "x").value.tolist() == [-1, 0, 1]


def test_a_profile_for_pictures_does_not_fit_numbers():
    """The request is denied rather than passed without its sanitizer."""
    with pytest.raises(PolicyError, match="pictures"):
        _compile({"step": "jpeg", "quality": 75}).tensor(np.zeros(3), "x")
