"""From pixels to tensors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import PeerError
from agent.inference.manifest import ImageModality
from agent.inference.preprocess import image_tensor


def _image(**options):
    return ImageModality(**{"input": "x", "layout": "NCHW", "height": 2, "width": 3, **options})


PIXELS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14


def test_values_follow_the_manifests_formula():
    """Low, high, mean and std act by channel, in that order."""
    image = _image(low=-1.0, high=1.0, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = (-1 + PIXELS / 255 * 2 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    tensor = image_tensor(image, "FP32", [PIXELS])
    assert tensor.dtype == np.float32
    assert tensor.shape == (1, 3, 2, 3)
    np.testing.assert_allclose(tensor[0].transpose(1, 2, 0), expected, rtol=1e-5, atol=1e-6)


def test_layout_colour_and_type():
    """Channels last, the other order, plain bytes and grey all are as said."""
    plain = {"low": 0.0, "high": 255.0}
    nhwc = image_tensor(_image(layout="NHWC", color="BGR", **plain), "UINT8", [PIXELS, PIXELS])
    assert nhwc.flags.c_contiguous
    np.testing.assert_array_equal(nhwc, np.stack([PIXELS[..., ::-1]] * 2))
    grey = image_tensor(_image(color="GRAY", **plain), "FP16", [PIXELS])
    np.testing.assert_allclose(grey[0, 0], PIXELS @ [0.299, 0.587, 0.114], atol=0.6)


def test_cut_takes_the_centre():
    """The shorter side is scaled, the longer one cut on both ends alike."""
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    tensor = image_tensor(_image(height=10, width=10, resize_short=10), "FP32", [wide])
    assert tensor.min() == 1.0


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 5000),
    short=st.integers(7, 300),
    turned=st.booleans(),
)
def test_every_shape_of_image_gives_the_models_shape(height, width, short, turned):
    """Extreme aspect ratios cost no more than their own pixels and never fail."""
    pixels = np.zeros((width, height, 3) if turned else (height, width, 3), dtype=np.uint8)
    assert image_tensor(_image(height=7, width=5, resize_short=short), "FP32", [pixels]).shape == (1, 3, 7, 5)


@pytest.mark.parametrize(
    "pictures",
    [
        [],
        [np.zeros((2, 3), np.uint8)],
        [np.zeros((2, 3, 4), np.uint8)],
        [np.zeros((2, 3, 3), np.float32)],
        [np.zeros((0, 3, 3), np.uint8)],
    ],
)
def test_what_is_no_picture_is_refused(pictures):
    """Nothing, grey without channels, alpha, floats, empty ones: a 400 that names the input."""
    with pytest.raises(PeerError, match=r"inputs\[x\]"):
        image_tensor(_image(), "FP32", pictures)
