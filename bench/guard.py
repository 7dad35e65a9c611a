"""What a guarded request pays for its wire format, its identity and its sanitizer, in microseconds (best of five).

Run from the repository's root: ``PYTHONPATH=. python bench/guard.py``. The last columns compare alternatives on the same data in
the same run; the choices stand in docs/adr/0012-image-libraries.md.
"""

import asyncio
import io
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import tritonclient.http as triton
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image, ImageFilter
from scipy.ndimage import median_filter

from agent.clock import now
from agent.gateway.oip import encode_infer_response, parse_infer_request
from agent.guard.admission import Admission, Limit
from agent.guard.filters import dct_low_pass, jpeg, median3
from agent.guard.images import decode_images
from agent.guard.profiles import validate_sanitizer
from agent.guard.sanitize import PixelScale, compile_profile, new_generator
from agent.identity.peer import PeerVerifier
from agent.identity.token import TokenVerifier
from agent.inference.tensors import InferResponse
from tests.support.identity import client_certificate, jwks, sign_token


def best_us(call: Callable[[], object], number: int) -> float:
    """Return microseconds of one call, the best of five rounds."""
    return min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6


def show(name: str, call: Callable[[], object], number: int = 200) -> None:
    """Print one line."""
    print(f"{name:48} {best_us(call, number):10.1f} us")


def wire() -> None:
    """Requests and answers as tritonclient makes them."""

    def body(tensor: npt.NDArray[Any], *, binary: bool) -> tuple[bytes, int | None]:
        client_input = triton.InferInput("x", list(tensor.shape), "FP32").set_data_from_numpy(
            tensor, binary_data=binary
        )
        outputs = [triton.InferRequestedOutput("y", binary_data=binary)]
        return triton.InferenceServerClient.generate_request_body([client_input], outputs=outputs, request_id="1")

    small = np.random.default_rng(1).random((1, 64), dtype=np.float32)
    large = np.random.default_rng(1).random((1, 3, 224, 224), dtype=np.float32)
    response = InferResponse("m", "1", "1", {"y": small[:, :10]})
    for name, tensor, binary, number in (
        ("parse 64 floats, JSON", small, False, 20000),
        ("parse 64 floats, binary", small, True, 20000),
        ("parse 150k floats, JSON", large, False, 5),
        ("parse 150k floats, binary", large, True, 500),
    ):
        data, length = body(tensor, binary=binary)
        show(name, lambda data=data, length=length: parse_infer_request(data, length), number)
        if tensor is small:
            request = parse_infer_request(data, length)
            show("  answer of 10 floats", lambda request=request: encode_infer_response(response, request), number)


def identity_and_limits() -> None:
    """Who asks, new and known; and whether it may ask now."""
    certificate = client_certificate(roles=["operator"])
    key = ec.generate_private_key(ec.SECP256R1())
    verifier = TokenVerifier(jwks(k1=key), audience="edge")
    token = sign_token(key, {"sub": "alice", "aud": "edge", "exp": int(now()) + 600, "roles": ["operator"]})
    show("certificate, new", lambda: PeerVerifier().principal(certificate))
    peers = PeerVerifier()
    show("certificate, known", lambda: peers.principal(certificate), 20000)
    show("token, new", lambda: verifier._verify(token))  # noqa: SLF001 -- past its memory, which is the point
    show("token, known", lambda: verifier.principal(token), 20000)
    limit = Limit(requests_per_second=1e6, burst=10**9, concurrency=9, max_bytes=9, max_batch=9)
    admission = Admission({"standard": limit})

    async def admitted(count: int) -> None:
        for number in range(count):
            admission.observe("alice", number)
            with await admission.enter("alice", "standard", number):
                pass

    show("admission of 1000 requests", lambda: asyncio.run(admitted(1000)), 5)


def images() -> None:
    """Codecs and filters on one 224 x 224 picture, beside the alternatives."""
    y, x = np.mgrid[:224, :224]
    noise = np.random.default_rng(1).normal(0, 6, (224, 224, 3))
    waves = np.stack([np.sin(y / 9), np.cos(x / 7), np.sin((x + y) / 31)], -1)
    pixels = np.clip(127 + 90 * waves + noise, 0, 255).astype(np.uint8)
    jpeg_bytes = simplejpeg.encode_jpeg(pixels, 75, "RGB", "420")
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    low_pass = dct_low_pass(6)

    def pillow_jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
        return buffer.getvalue()

    show("JPEG decode, here (simplejpeg)", lambda: decode_images([jpeg_bytes], "x"))
    show("JPEG decode, Pillow", lambda: np.asarray(Image.open(io.BytesIO(jpeg_bytes)).convert("RGB")))
    show("JPEG encode, simplejpeg", lambda: simplejpeg.encode_jpeg(pixels, 75, "RGB", "420"))
    show("JPEG encode, Pillow", pillow_jpeg)
    show("JPEG round trip, here", lambda: jpeg(pixels, 75))
    show("PNG decode, here (Pillow)", lambda: decode_images([png.getvalue()], "x"), 50)
    show("median 3 x 3, here (numpy network)", lambda: median3(pixels))
    show("median 3 x 3, Pillow", lambda: np.asarray(Image.fromarray(pixels).filter(ImageFilter.MedianFilter(3))), 5)
    show("median 3 x 3, SciPy", lambda: median_filter(pixels, size=(3, 3, 1)), 5)
    show("DCT low-pass 6 of 8, here", lambda: low_pass(pixels))
    scale = PixelScale("NCHW", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    tensor = scale.to_tensor(pixels[np.newaxis], np.dtype(np.float32))
    profile = compile_profile(
        validate_sanitizer("image-default", [{"step": "jpeg", "quality": 75}, {"step": "median", "size": 3}])
    )
    generator = new_generator()
    show("image-default on pixels", lambda: profile.picture(pixels, generator))
    show("image-default on a normalized tensor", lambda: profile.picture_tensor(tensor, "x", scale, generator))


if __name__ == "__main__":
    wire()
    identity_and_limits()
    images()
