"""What several rooms ask of an array."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["all_finite"]

_BLAS_BYTES = 4


def all_finite(array: npt.NDArray[Any]) -> bool:
    """Say whether a float array holds neither NaN nor infinities."""
    # The sum of squares is finite for every usual array, in a fraction of the time of looking at each element. Half precision would overflow.
    if array.dtype.itemsize >= _BLAS_BYTES and math.isfinite(np.vdot(array, array)):
        return True
    return bool(np.isfinite(array).all())
