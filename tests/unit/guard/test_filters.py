"""Filters against reference implementations of SciPy and Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import median_filter

from agent.guard.filters import BLOCK, dct_low_pass, jpeg, median3

_PICTURES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3)))


def _smooth(height, width):
    """A picture such as a camera makes: no noise."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(y / 9), 127 + 120 * np.cos(x / 7), 127 + 100 * np.sin((x + y) / 11)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def _reference_low_pass(pixels, keep):
    height, width, _ = pixels.shape
    padded = np.pad(pixels.astype(float), ((0, -height % BLOCK), (0, -width % BLOCK), (0, 0)), mode="edge")
    for top in range(0, padded.shape[0], BLOCK):
        for left in range(0, padded.shape[1], BLOCK):
            block = padded[top : top + BLOCK, left : left + BLOCK]
            frequencies = dctn(block, axes=(0, 1), norm="ortho")
            frequencies[keep:] = 0
            frequencies[:, keep:] = 0
            padded[top : top + BLOCK, left : left + BLOCK] = idctn(frequencies, axes=(0, 1), norm="ortho")
    return np.clip(padded[:height, :width], 0, 255)


@given(_PICTURES)
def test_the_median_is_scipys(pixels):
    """Every value, the edges included, is what an independent median filter gives."""
    before = pixels.copy()
    assert np.array_equal(median3(pixels), median_filter(pixels, size=(3, 3, 1), mode="nearest"))
    assert np.array_equal(pixels, before)


def test_the_median_of_every_order_of_nine_is_right():
    """By the zero-one principle a network that sorts all 512 patterns of two values is right for all values."""
    for pattern in range(512):
        window = np.array([(pattern >> bit) & 1 for bit in range(9)], np.uint8).reshape(3, 3, 1).repeat(3, axis=2)
        assert median3(window)[1, 1, 0] == (pattern.bit_count() >= 5)


@given(_PICTURES, st.integers(1, 8))
def test_the_low_pass_is_scipys_dct(pixels, keep):
    """Transforming, clearing and transforming back with SciPy gives the same pixels, up to rounding."""
    before = pixels.copy()
    filtered = dct_low_pass(keep)(pixels)
    assert filtered.shape == pixels.shape
    assert np.abs(filtered - _reference_low_pass(pixels, keep)).max() <= 0.51
    assert np.array_equal(pixels, before)


@given(_PICTURES)
def test_keeping_every_frequency_changes_nothing(pixels):
    """With keep 8 the filter is the identity."""
    assert np.array_equal(dct_low_pass(8)(pixels), pixels)


def test_keeping_one_frequency_leaves_the_mean():
    """With keep 1 each block becomes its mean."""
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert np.abs(dct_low_pass(1)(pixels) - pixels.mean(axis=(0, 1))).max() <= 0.5


@given(_PICTURES, st.integers(1, 100))
def test_any_picture_survives_a_jpeg_round_trip_in_its_shape(pixels, quality):
    """Odd sizes down to one pixel and every quality are encoded and decoded."""
    assert jpeg(pixels, quality).shape == pixels.shape


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_the_jpeg_round_trip_is_pillows(quality):
    """An independent JPEG codec at the same quality and subsampling gives nearly the same picture."""
    pixels = _smooth(64, 80)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    other = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
    assert np.abs(jpeg(pixels, quality).astype(int) - other).mean() < 1


def test_each_filter_removes_noise_and_keeps_the_picture():
    """What an attack adds shrinks in each filter, on a picture that has no fine detail of its own."""
    clean = _smooth(96, 96).astype(int)
    noise = np.random.default_rng(7).choice([-8, 8], size=clean.shape)
    noisy = np.clip(clean + noise, 0, 255).astype(np.uint8)
    before = np.abs(noisy - clean).mean()
    for sanitize in (median3, dct_low_pass(4), lambda pixels: jpeg(pixels, 50)):
        assert np.abs(sanitize(noisy) - clean).mean() < 0.7 * before


def test_filters_take_pictures_of_any_memory_order():
    """A reversed or transposed view gives what its copy gives."""
    pixels = _smooth(17, 23)
    for view in (pixels[..., ::-1], pixels[::-1], pixels.transpose(1, 0, 2)):
        for sanitize in (median3, dct_low_pass(5), lambda picture: jpeg(picture, 80)):
            assert np.array_equal(sanitize(view), sanitize(view.copy()))
