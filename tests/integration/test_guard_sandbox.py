"""The guard's work inside the real sandbox of a gateway."""

import asyncio
import io
import json
import os

import numpy as np
import pytest
import tritonclient.http as triton
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from agent.isolation.channel import Channel
from agent.isolation.sandbox import Profile
from agent.isolation.supervisor import ChildSpec, Zygote
from tests.support.guard_entries import work
from tests.support.identity import client_certificate, jwks, sign_token
from tests.support.isolation import LIMITS, NOBODY

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("isolation")]
_ENTRIES = "tests.support.guard_entries"
_PIXELS = np.random.default_rng(3).integers(0, 256, (64, 48, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def zygote():
    started = Zygote.start([_ENTRIES], user=(NOBODY, NOBODY) if os.getuid() == 0 else None)
    yield started
    started.close()


def _image(kind, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _request(*images):
    elements = triton.InferInput("x", [len(images)], "BYTES").set_data_from_numpy(np.array(images, object))
    return triton.InferenceServerClient.generate_request_body([elements])


async def _ask(channel, arguments):
    body, length, certificate, keys, token = arguments
    channel.send(json.dumps([body.hex(), length, certificate.hex(), keys.hex(), token]).encode())
    frames = await asyncio.to_thread(channel.receive, 30)
    assert frames is not None, "the child has died"
    return json.loads(frames[0].data)


async def test_pictures_certificates_and_tokens_are_handled_in_the_gateway_sandbox(zygote):
    """Every codec, filter and verifier gives behind Landlock and seccomp what it gives outside, refusals too."""
    key = ec.generate_private_key(ec.SECP256R1())
    token = sign_token(key, {"sub": "alice", "aud": "edge", "exp": 4_000_000_000})
    jpeg, png = _image("JPEG"), _image("PNG")
    good = [
        _request(jpeg, _image("JPEG", progressive=True)),
        _request(png, _image("PNG", mode="RGBA")),
        _request(_image("PNG", "P")),
    ]
    bad = [_request(jpeg[:-40]), _request(png[:-40]), _request(b"GIF89a"), (good[0][0][:-1], good[0][1]), (b"{", 1)]
    child = await zygote.spawn(ChildSpec(Profile.GATEWAY, f"{_ENTRIES}:guard", LIMITS))
    channel = Channel(child.sock)
    try:
        for request in good + bad:
            arguments = (*request, client_certificate(), jwks(k1=key), token)
            answer = await _ask(channel, arguments)
            assert answer == work(*arguments)
            assert ("refused" in answer) == (request in bad)
    finally:
        channel.close()
        await child.wait()
