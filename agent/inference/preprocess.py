"""From decoded pixels to the input that an image model takes, as its manifest says.

Rules:

1. Pixels are HWC, uint8, RGB; whoever decodes them owns the limits on their number.
2. The part that is cut out is computed in the source's coordinates and scaled once: an image of one by a million pixels
   costs no more than any other.
3. ``value = (low + pixel / 255 * (high - low) - mean) / std`` by channel, in float32.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from agent.errors import PeerError
from agent.inference.manifest import ImageModality
from agent.inference.tensors import Tensor, dtype_of

__all__ = ["image_tensor"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def image_tensor(image: ImageModality, datatype: str, pictures: Sequence[Tensor]) -> Tensor:
    """Return the model's input for a batch of decoded pictures.

    Args:
        image: how the model wants them.
        datatype: OIP datatype of the input.
        pictures: each HWC, uint8, RGB.

    Returns:
        ``[N, C, H, W]`` or ``[N, H, W, C]`` of that datatype, C-contiguous.

    Raises:
        PeerError: 400 ``image``, when there is none or one has another form.
    """
    if not pictures:
        raise PeerError(400, "image", f"inputs[{image.input}]: no image")
    for index, picture in enumerate(pictures):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:  # noqa: PLR2004 -- HWC, RGB
            raise PeerError(400, "image", f"inputs[{image.input}]: image {index} is not height x width x RGB")
    batch = np.stack([_scaled(image, picture) for picture in pictures])
    batch = _colored(image, batch)
    if datatype != "UINT8":  # the manifest allows UINT8 only for plain pixels
        mean, std = np.array(image.mean), np.array(image.std)
        scale = ((image.high - image.low) / 255 / std).astype(np.float32)
        bias = ((image.low - mean) / std).astype(np.float32)
        batch = np.multiply(batch, scale, dtype=np.float32)
        batch += bias
    if image.layout == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(batch, dtype=dtype_of(datatype))


def _scaled(image: ImageModality, picture: Tensor) -> Tensor:
    height, width = picture.shape[:2]
    if image.resize_short is None:
        if (height, width) == (image.height, image.width):
            return picture
        box = (0.0, 0.0, float(width), float(height))
    else:
        ratio = min(width, height) / image.resize_short
        cut_width, cut_height = image.width * ratio, image.height * ratio
        left, top = (width - cut_width) / 2, (height - cut_height) / 2
        # Rounding may step over the edge by less than a millionth of a pixel, which Pillow refuses.
        box = (max(left, 0.0), max(top, 0.0), min(left + cut_width, width), min(top + cut_height, height))
    scaled = Image.fromarray(picture).resize((image.width, image.height), Image.Resampling.BICUBIC, box)
    return np.asarray(scaled)


def _colored(image: ImageModality, batch: Tensor) -> Tensor:
    match image.color:
        case "RGB":
            return batch
        case "BGR":
            return batch[..., ::-1]
        case "GRAY":
            return np.rint(batch @ _LUMA).astype(np.uint8)[..., np.newaxis]
