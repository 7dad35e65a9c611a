"""The guard's work inside a sandboxed child; preloaded by the test's zygote, so everything is imported at the top."""

import hashlib
import json

import numpy as np

from agent.errors import PeerError
from agent.gateway.oip import parse_infer_request
from agent.guard.images import decode_images
from agent.guard.profiles import validate_sanitizer
from agent.guard.sanitize import compile_profile
from agent.identity.peer import PeerVerifier
from agent.identity.token import TokenVerifier
from agent.isolation.channel import Channel
from agent.isolation.child import Child

STEPS = (
    {"step": "dct", "keep": 5},
    {"step": "median", "size": 3},
    {"step": "jpeg", "quality_min": 60, "quality_max": 90},
)


def work(body: bytes, header_length: int, certificate: bytes, jwks: bytes, token: str) -> dict[str, object]:
    """Do once what a gateway does with a request that holds images, and say what came out."""
    profile = compile_profile(validate_sanitizer("all", STEPS))
    generator = np.random.default_rng(7)
    try:
        images = list(parse_infer_request(body, header_length).inputs["x"].flat)
        pictures = [profile.picture(pixels, generator).value for pixels in decode_images(images, "x")]
    except PeerError as error:
        return {"refused": error.reason}
    return {
        "pictures": [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures],
        "peer": PeerVerifier().principal(certificate).id,
        "token": TokenVerifier(jwks, audience="edge").principal(token).id,
    }


def guard(child: Child) -> None:
    """Enter the sandbox, then answer each frame, a JSON list of :func:`work`'s arguments with bytes in hex."""
    child.enter_sandbox()
    channel = Channel(child.channel)
    while (frames := channel.receive()) is not None:
        for frame in frames:
            body, length, certificate, jwks, token = json.loads(frame.data)
            result = work(bytes.fromhex(body), length, bytes.fromhex(certificate), bytes.fromhex(jwks), token)
            channel.send(json.dumps(result).encode())
