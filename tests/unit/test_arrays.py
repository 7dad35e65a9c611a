"""What several rooms ask of an array."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agent.arrays import all_finite


@given(
    arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=st.floats(width=16, allow_nan=True, allow_infinity=True),
    )
)
def test_the_short_way_says_what_the_long_one_says(array):
    """For every array it is the answer that looking at each element gives."""
    assert all_finite(array) == bool(np.isfinite(array).all())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_numbers_are_finite(dtype):
    """Numbers whose squares overflow are told from infinities, without a warning, also where they do not lie one after the other."""
    largest = np.full((4, 6), np.finfo(dtype).max, dtype)
    assert all_finite(largest)
    assert all_finite(largest[:, ::2])
    largest[3, 4] = np.inf
    assert not all_finite(largest)
    assert not all_finite(largest[:, ::2])
    assert all_finite(largest[:, 1::2])
