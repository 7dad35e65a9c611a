"""Decoding: right pixels from real encoders, and no more work than the limits allow for hostile files."""

import io
import os
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from agent.errors import PeerError
from agent.guard.images import MAX_JPEG_SCANS, MAX_PNG_CHUNKS, ImageLimits, decode_images
from tests.support.outcome import value_or_refusal

_PIXELS = np.random.default_rng(3).integers(0, 256, (12, 16, 3)).astype(np.uint8)
_GRADIENT = np.stack([*np.meshgrid(np.arange(0, 160, 10), np.arange(0, 120, 10)), np.full((12, 16), 50)], -1).astype(
    np.uint8
)


def _encode(kind, pixels=_PIXELS, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


_PNG = _encode("PNG")
_JPEG = _encode("JPEG", _GRADIENT, quality=95)


def _decode(data, **limits):
    return decode_images([data], "inputs[0].data", ImageLimits(**limits))[0]


def _refusal(data, **limits):
    with pytest.raises(PeerError) as refusal:
        _decode(data, **limits)
    return refusal.value


def _chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(*chunks, header=(16, 12, 8, 2, 0, 0, 0)):
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + b"".join(chunks)


def test_a_png_is_decoded_exactly():
    """Every pixel is what was encoded, as an array of its own."""
    pixels = _decode(_PNG)
    assert np.array_equal(pixels, _PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"optimize": True}])
def test_a_jpeg_is_decoded_as_pillow_does(options):
    """Baseline and progressive images, with any subsampling, look as they were."""
    data = _encode("JPEG", _GRADIENT, quality=95, **options)
    other = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(_decode(data).astype(int) - other).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB"])
def test_every_form_of_png_becomes_rgb(mode):
    """Grey, palette and bilevel images become three channels, as Pillow converts them."""
    data = _encode("PNG", mode=mode)
    expected = np.asarray(Image.fromarray(_PIXELS).convert(mode).convert("RGB"))
    assert np.array_equal(_decode(data), expected)


def test_grey_jpegs_become_rgb():
    """A one-component JPEG has three equal channels."""
    pixels = _decode(_encode("JPEG", mode="L"))
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_transparency_is_laid_over_white():
    """What a viewer would not show, the model does not see: alpha, palette and key color alike."""
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[0, 0] = (200, 10, 10, 255)
    buffer = io.BytesIO()
    Image.fromarray(hidden).save(buffer, "PNG")
    pixels = _decode(buffer.getvalue())
    assert pixels[0, 0].tolist() == [200, 10, 10]
    assert (pixels.reshape(-1, 3)[1:] == 255).all()
    keyed = _encode("PNG", np.zeros((2, 2, 3), np.uint8), transparency=(0, 0, 0))
    assert (_decode(keyed) == 255).all()
    palette = _encode("PNG", np.zeros((2, 2), np.uint8), mode="P", transparency=0)
    assert (_decode(palette) == 255).all()


def test_an_interlaced_png_is_decoded():
    """The one form that Pillow does not write: Adam7, a single pixel."""
    row = zlib.compress(b"\0\x0a\x14\x1e")
    data = _png(_chunk(b"IDAT", row), _chunk(b"IEND"), header=(1, 1, 8, 2, 0, 0, 1))
    assert _decode(data).tolist() == [[[10, 20, 30]]]


# --- bombs


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (100_000, 1), (1, 100_000), (8192, 8192), (0, 5), (5, 0)])
def test_the_size_of_a_png_is_refused_by_its_header(size):
    """A few bytes that stand for gigabytes never reach a decoder."""
    refusal = _refusal(_png(header=(*size, 8, 2, 0, 0, 0)))
    assert (refusal.status, refusal.reason) == (413, "image_too_large")


def test_the_size_of_a_jpeg_is_refused_by_its_header():
    """The sides in the frame header count, whatever follows."""
    frame = _JPEG.index(b"\xff\xc0")
    bomb = _JPEG[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + _JPEG[frame + 9 :]
    assert _refusal(bomb).status == 413


def test_pixels_and_bytes_of_one_request_are_added():
    """Each image is within its limit, and together they are not: nothing is decoded."""
    limits = ImageLimits(request_pixels=3 * 192)
    assert len(decode_images([_PNG, _JPEG, _PNG], "x", limits)) == 3
    with pytest.raises(PeerError) as refusal:
        decode_images([_PNG, _JPEG, _PNG, _PNG], "x", limits)
    assert refusal.value.status == 413
    assert _refusal(_PNG, image_bytes=len(_PNG) - 1).status == 413
    assert _refusal(_PNG, pixels=191).status == 413
    assert _refusal(_PNG, side=15).status == 413


def _run(program, *images):
    """Run a program of its own process with images as ``images``; return its exit status and what it complained of."""
    head = "import sys\nimages = [bytes.fromhex(word) for word in sys.stdin.read().split()]\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(program)],
        input=" ".join(image.hex() for image in images),
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.defpath},  # none of what measures coverage, which opens files
    )
    return done.returncode, done.stderr


_IN_LITTLE_MEMORY = """
    import resource
    from agent.errors import PeerError
    from agent.guard.images import decode_images
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), size + (32 << 20)))
    for image in images:
        try:
            decode_images([image], "x")
        except PeerError:
            pass
"""


def test_what_inflates_past_the_pixels_costs_no_memory():
    """A quarter of a gigabyte in text, profile or pixel data passes through a process that may take 32 MiB."""
    bomb = zlib.compress(bytes(1 << 28), 9)
    chunks = [
        _chunk(b"zTXt", b"k\0\0" + bomb),
        _chunk(b"iCCP", b"k\0\0" + bomb),
        _chunk(b"iTXt", b"k\0\1\0\0\0" + bomb),
    ]
    at = _PNG.index(b"IDAT") - 4
    dressed = _PNG[:at] + b"".join(chunks) + _PNG[at:]
    assert np.array_equal(_decode(dressed), _PIXELS)
    assert _run(_IN_LITTLE_MEMORY, dressed, _png(_chunk(b"IDAT", bomb), _chunk(b"IEND"))) == (0, "")


def test_progressive_scans_are_bounded():
    """Each scan would cost a pass over the whole image."""
    data = _encode("JPEG", _GRADIENT, progressive=True)
    scan = data.index(b"\xff\xda")
    refusal = _refusal(data[:-2] + data[scan:-2] * MAX_JPEG_SCANS + b"\xff\xd9")
    assert "scans" in str(refusal)


def test_png_chunks_are_bounded():
    """Empty chunks by the thousand are refused."""
    assert "chunks" in str(_refusal(_png(_chunk(b"IDAT") * (MAX_PNG_CHUNKS + 1), _chunk(b"IEND"))))


# --- malformed


def test_every_truncation_is_refused():
    """No prefix of an image is an image."""
    for data in (_PNG, _JPEG, _encode("JPEG", _GRADIENT, progressive=True)):
        for end in range(len(data) - 1):
            assert _refusal(data[:end]).status in {400, 413}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a" + bytes(20),
        b"RIFF\0\0\0\0WEBP",
        b"\x00\x00\x00\x0cjP  \r\n\x87\n",
        b"%!PS-Adobe-3.0",
        _PNG + b"\0",
        _PNG + _JPEG,
        _png(_chunk(b"acTL", bytes(8)), _chunk(b"IEND")),
        _png(_chunk(b"ABCD"), _chunk(b"IEND")),
        _png(_chunk(b"IEND")),
        _png(_chunk(b"IDAT", b"\0\0"), _chunk(b"IEND")),
        _png(header=(16, 12, 16, 2, 0, 0, 0)),
        _png(header=(16, 12, 3, 2, 0, 0, 0)) + _chunk(b"IEND"),
        _encode("PNG", mode="I;16"),
        _encode("JPEG", mode="CMYK"),
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IDAT", bytes(13)),
    ],
)
def test_what_is_no_jpeg_or_png_is_refused(data):
    """Other formats, trailing data, animations, deep colors and damaged structure get 400."""
    assert (_refusal(data).status, _refusal(data).reason) == (400, "image")


def test_an_animated_png_is_refused():
    """As Pillow writes it."""
    frames = [Image.fromarray(_PIXELS), Image.fromarray(255 - _PIXELS)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    assert "animation" in str(_refusal(buffer.getvalue()))


def test_text_chunks_of_a_real_encoder_are_dropped():
    """A PNG with metadata is an ordinary picture."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 5000, zip=True)
    assert np.array_equal(_decode(_encode("PNG", pnginfo=info)), _PIXELS)


@pytest.mark.fuzz
@given(
    st.sampled_from([_PNG, _JPEG, _encode("PNG", mode="P"), _encode("JPEG", _GRADIENT, progressive=True)]), st.data()
)
def test_damaged_images_are_refused_or_decoded_in_their_size(image, data):
    """Any bytes may change, checksums made right again or not: only PeerError comes out."""
    damaged = bytearray(image)
    for _ in range(data.draw(st.integers(1, 10))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = _with_checksums(damaged)
    outcome = value_or_refusal(lambda: _decode(bytes(damaged), pixels=1 << 16))
    if isinstance(outcome, PeerError):
        assert outcome.status in {400, 413}
    else:
        assert outcome.ndim == 3
        assert outcome.shape[2] == 3


def _with_checksums(png):
    at = 8
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        end = at + 8 + length
        if end + 4 > len(png):
            break
        struct.pack_into(">I", png, end, zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return png


@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]), st.binary(max_size=200))
def test_arbitrary_bytes_are_no_image(magic, data):
    """Noise, with a magic number or without, gets a PeerError."""
    assert _refusal(magic + data).status in {400, 413}


_WITHOUT_FILES = """
    from agent.errors import PeerError
    from agent.guard.images import decode_images
    from agent.guard.profiles import validate_sanitizer
    from agent.guard.sanitize import compile_profile, new_generator
    steps = [{"step": "dct", "keep": 5}, {"step": "median", "size": 3}, {"step": "jpeg", "quality_min": 60, "quality_max": 90}]
    profile, generator = compile_profile(validate_sanitizer("all", steps)), new_generator()

    def hook(event, arguments):
        if event in {"open", "import", "os.listdir", "os.scandir", "tempfile.mkstemp", "subprocess.Popen"}:
            sys.stderr.write(f"{event} {arguments[0]}")
            raise SystemExit(1)

    sys.addaudithook(hook)
    for pixels in decode_images(images, "x"):
        profile.picture(pixels, generator)
    for image in images:
        try:
            decode_images([image[:-20]], "x")
        except PeerError:
            pass
"""


def test_decoding_and_filtering_open_no_file():
    """After the import nothing is opened, listed or imported, as the sandbox demands."""
    assert _run(_WITHOUT_FILES, _JPEG, _PNG, _encode("PNG", mode="RGBA"), _encode("PNG", mode="P")) == (0, "")
