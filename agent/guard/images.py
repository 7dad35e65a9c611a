"""JPEG and PNG from a client to pixels, within limits that are known from the header before anything is decoded.

Rules:

1. The format is told by its magic number, never by a name; only JPEG and PNG are read.
2. Bytes, sides and pixels, of one image and of all images of a request, are checked from the headers before the first is
   decoded: a few kilobytes can stand for gigabytes.
3. JPEG: 8 bit; grey or three components; at most :data:`MAX_JPEG_SCANS` scans, because each scan of a progressive image
   costs a pass over all of it. What libjpeg only warns of (truncation, garbage) is refused.
4. PNG: at most 8 bit a channel. The decoder sees only the chunks that make pixels (IHDR, PLTE, tRNS, IDAT, IEND): text,
   profiles and EXIF, some of them compressed, are dropped unread; animations, unknown critical chunks and anything after
   IEND are refused.
5. Transparent pixels are laid over white, as a viewer shows them: else a picture could show a person one thing and the
   model another. EXIF orientation is not applied.

Everything is imported and initialised with this module, and nothing here opens a file: it works inside the sandbox.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, PngImagePlugin

from agent.errors import PeerError

__all__ = ["DEFAULT_LIMITS", "MAX_JPEG_SCANS", "MAX_PNG_CHUNKS", "ImageLimits", "Pixels", "decode_images"]

Pixels: TypeAlias = npt.NDArray[np.uint8]  # [height, width, 3], RGB

MAX_JPEG_SCANS = 64
MAX_PNG_CHUNKS = 8192


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What may be decoded: 3840 x 2160 pixels fit the default, and four such images a request."""

    image_bytes: int = 16 << 20
    side: int = 8192
    pixels: int = 1 << 23
    request_pixels: int = 1 << 25


DEFAULT_LIMITS = ImageLimits()

_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_START_OF_SCAN = b"\xff\xda"
_JPEG_COLORS = frozenset({"Gray", "YCbCr", "RGB"})
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = struct.Struct(">I4sIIBB")  # length, IHDR, width, height, bit depth, color type
_PNG_CHUNK = struct.Struct(">I4s")
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_ANIMATION = frozenset({b"acTL", b"fcTL", b"fdAT"})
_PNG_CRC_BYTES = 4
_PNG_MAX_BIT_DEPTH = 8
_ANCILLARY_BIT = 0x20  # of a chunk type's first letter (PNG specification, 5.4)

# What Pillow's PNG reader raises on damaged data.
_PNG_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def decode_images(images: Sequence[bytes], where: str, limits: ImageLimits = DEFAULT_LIMITS) -> list[Pixels]:
    """Decode the images of one request.

    Args:
        images: encoded images.
        where: their place in the request, for errors.
        limits: what may be decoded.

    Returns:
        For each image an array of its own: ``[height, width, 3]``, uint8, RGB.

    Raises:
        PeerError: 413 ``image_too_large``, 400 ``image``.
    """
    total = 0
    for index, data in enumerate(images):
        height, width = _size(data, f"{where}[{index}]", limits)
        total += height * width
        if total > limits.request_pixels:
            raise PeerError(413, "image_too_large", f"{where}: more than {limits.request_pixels} pixels in one request")
    return [
        _decode_jpeg(data, f"{where}[{index}]")
        if data.startswith(_JPEG_MAGIC)
        else _decode_png(data, f"{where}[{index}]")
        for index, data in enumerate(images)
    ]


def _size(data: bytes, where: str, limits: ImageLimits) -> tuple[int, int]:
    if len(data) > limits.image_bytes:
        raise PeerError(413, "image_too_large", f"{where}: more than {limits.image_bytes} bytes")
    if data.startswith(_JPEG_MAGIC):
        height, width = _jpeg_size(data, where)
    elif data.startswith(_PNG_MAGIC):
        height, width = _png_size(data, where)
    else:
        raise _bad(where, "neither JPEG nor PNG")
    if not 0 < height <= limits.side or not 0 < width <= limits.side or height * width > limits.pixels:
        raise PeerError(
            413, "image_too_large", f"{where}: more than {limits.pixels} pixels or a side not within 1 to {limits.side}"
        )
    return height, width


def _jpeg_size(data: bytes, where: str) -> tuple[int, int]:
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise _bad(where, "the JPEG header is damaged") from error
    if color not in _JPEG_COLORS:
        raise _bad(where, "a JPEG must be grey or have three color components")
    # In entropy-coded data a marker cannot occur by chance; in an EXIF thumbnail it may: the limit leaves room for that.
    if data.count(_JPEG_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise _bad(where, f"a JPEG of more than {MAX_JPEG_SCANS} scans")
    return height, width


def _decode_jpeg(data: bytes, where: str) -> Pixels:
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        raise _bad(where, "the JPEG is damaged or truncated") from error
    return pixels


def _png_size(data: bytes, where: str) -> tuple[int, int]:
    if len(data) < len(_PNG_MAGIC) + _PNG_HEADER.size:
        raise _bad(where, "the PNG header is truncated")
    _, kind, width, height, bit_depth, _ = _PNG_HEADER.unpack_from(data, len(_PNG_MAGIC))
    if kind != b"IHDR":
        raise _bad(where, "a PNG must begin with IHDR")
    if bit_depth > _PNG_MAX_BIT_DEPTH:
        raise _bad(where, f"a PNG of more than {_PNG_MAX_BIT_DEPTH} bits a channel")
    return height, width


def _decode_png(data: bytes, where: str) -> Pixels:
    pixels_only = _drop_ancillary(data, where)
    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(pixels_only)) as image:
            image.load()
            if not image.has_transparency_data:
                return np.array(image.convert("RGB"))
            layer = image.convert("RGBA")
    except _PNG_ERRORS as error:
        raise _bad(where, "the PNG is damaged or truncated") from error
    white = Image.new("RGBA", layer.size, "white")
    return np.array(Image.alpha_composite(white, layer).convert("RGB"))


def _drop_ancillary(data: bytes, where: str) -> bytes:
    """Return the PNG with only those chunks that make pixels; their checksums are the decoder's to verify."""
    parts = [_PNG_MAGIC]
    at = len(_PNG_MAGIC)
    for _ in range(MAX_PNG_CHUNKS):
        if len(data) - at < _PNG_CHUNK.size + _PNG_CRC_BYTES:
            raise _bad(where, "the PNG is truncated")
        length, kind = _PNG_CHUNK.unpack_from(data, at)
        end = at + _PNG_CHUNK.size + length + _PNG_CRC_BYTES
        if end > len(data):
            raise _bad(where, "the PNG is truncated")
        if kind in _PNG_KEPT:
            parts.append(data[at:end])
        elif kind in _PNG_ANIMATION or not kind[0] & _ANCILLARY_BIT:
            raise _bad(where, "a PNG with an animation or an unknown critical chunk")
        if kind == b"IEND":
            if end != len(data):
                raise _bad(where, "data follows the end of the PNG")
            return b"".join(parts)
        at = end
    raise _bad(where, f"a PNG of more than {MAX_PNG_CHUNKS} chunks")


def _bad(where: str, what: str) -> PeerError:
    return PeerError(400, "image", f"{where}: {what}")
