"""Image filters that remove what a picture does not need and an attack does; pure functions of pixels.

All take and give ``[height, width, 3]`` uint8 RGB, at least one pixel, and leave their argument as it is.

Sources: T. Huang et al., "A fast two-dimensional median filtering algorithm" (1979), for the median; here as a sorting
network over shared columns (J. L. Smith, "Implementing median filters in XC4000E FPGAs", 1996), which numpy runs on whole
rows at once. ITU-T T.81 (JPEG), A.3.3, for the 8 x 8 DCT-II.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import simplejpeg

from agent.guard.images import Pixels

__all__ = ["BLOCK", "dct_low_pass", "jpeg", "median3"]

BLOCK = 8  # pixels, a side of a DCT block
_CHANNELS = 3


def jpeg(pixels: Pixels, quality: int) -> Pixels:
    """Encode as JPEG (4:2:0) of ``quality`` 1..100 and decode again."""
    # The codec reads memory in row-major order; a filter before this one may have left another.
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "420")
    decoded: Pixels = simplejpeg.decode_jpeg(encoded, "RGB")
    return decoded


def median3(pixels: Pixels) -> Pixels:
    """Replace each value by the median of its 3 x 3 neighbourhood in its channel; edges are repeated outwards."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    above, here, below = padded[:-2], padded[1:-1], padded[2:]
    # Sort each column of three once; three neighbouring windows share it.
    low, high = np.minimum(above, here), np.maximum(above, here)
    middle, high = np.minimum(high, below), np.maximum(high, below)
    low, middle = np.minimum(low, middle), np.maximum(low, middle)
    # The median of nine is the median of: the greatest low, the median middle, the least high.
    greatest_low = _reduce(np.maximum, low)
    least_high = _reduce(np.minimum, high)
    median_middle = _median(middle[:, :-2], middle[:, 1:-1], middle[:, 2:])
    return _median(greatest_low, median_middle, least_high)


def _reduce(operation: Callable[[Pixels, Pixels], Pixels], columns: Pixels) -> Pixels:
    return operation(operation(columns[:, :-2], columns[:, 1:-1]), columns[:, 2:])


def _median(a: Pixels, b: Pixels, c: Pixels) -> Pixels:
    result: Pixels = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    return result


def dct_low_pass(keep: int) -> Callable[[Pixels], Pixels]:
    """Return a filter that keeps the ``keep`` x ``keep`` lowest frequencies of each 8 x 8 block, ``keep`` 1..8.

    To transform a block, clear its high frequencies and transform back is one linear projection ``P B P``, with
    ``P = D' D`` of the first ``keep`` rows ``D`` of the orthonormal DCT-II. Edges are repeated to whole blocks.
    """
    rows = _dct_rows()[:keep]
    projection = (rows.T @ rows).astype(np.float32)
    across = np.kron(projection, np.eye(_CHANNELS, dtype=np.float32))  # eight pixels of three interleaved channels

    def apply(pixels: Pixels) -> Pixels:
        height, width, _ = pixels.shape
        whole = np.pad(pixels, ((0, -height % BLOCK), (0, -width % BLOCK), (0, 0)), mode="edge").astype(np.float32)
        shape = whole.shape
        down = np.matmul(projection, whole.reshape(shape[0] // BLOCK, BLOCK, shape[1] * _CHANNELS))
        values = (down.reshape(-1, BLOCK * _CHANNELS) @ across).reshape(shape)
        np.clip(np.rint(values, out=values), 0, 255, out=values)
        filtered: Pixels = values[:height, :width].astype(np.uint8)
        return filtered

    return apply


def _dct_rows() -> npt.NDArray[np.float64]:
    n = np.arange(BLOCK)
    rows: npt.NDArray[np.float64] = np.sqrt(2 / BLOCK) * np.cos(np.pi * (2 * n + 1) * n[:, np.newaxis] / (2 * BLOCK))
    rows[0] /= np.sqrt(2)
    return rows
