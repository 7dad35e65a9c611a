"""The requests that are sent: raw HTTP/1.1, one file each, made from a seed."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.example_models import ASSETS

__all__ = ["Workload", "write_workloads"]

SEED = 7
SIDE = 224  # pixels


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of request to one model."""

    name: str
    model: str
    request: Path


def write_workloads(directory: Path) -> list[Workload]:
    """Write the four requests."""
    directory.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng(SEED)
    numbers = source.standard_normal((1, 64)).astype(np.float32)
    picture = _picture()
    scaled = (np.asarray(picture, np.float32)[..., ::-1] / 255.0 - 0.45) / 0.225
    tensor = np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=92)
    element = len(jpeg.getvalue()).to_bytes(4, "little") + jpeg.getvalue()
    plain = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": numbers.ravel().tolist()}]}
    kinds: list[tuple[str, str, tuple[bytes, int | None]]] = [
        ("tiny, JSON", "tiny", (json.dumps(plain).encode(), None)),
        ("tiny, binary", "tiny", _binary("FP32", [1, 64], numbers.tobytes())),
        ("picture, FP32 tensor", "orientation", _binary("FP32", list(tensor.shape), tensor.tobytes())),
        ("picture, JPEG", "orientation", _binary("BYTES", [1], element)),
    ]
    workloads = []
    for name, model, (body, header_length) in kinds:
        path = directory / f"{name.replace(', ', '-').replace(' ', '-')}.http"
        path.write_bytes(_http(model, body, header_length))
        workloads.append(Workload(name, model, path))
    return workloads


def _picture() -> Image.Image:
    with Image.open(ASSETS / "skimage" / "data" / "page.png") as page:
        return page.convert("RGB").resize((SIDE, SIDE))


def _binary(datatype: str, shape: list[int], data: bytes) -> tuple[bytes, int]:
    header: dict[str, Any] = {
        "inputs": [{"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}]
    }
    encoded = json.dumps(header).encode()
    return encoded + data, len(encoded)


def _http(model: str, body: bytes, header_length: int | None) -> bytes:
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json" if header_length is None else "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
    ]
    if header_length is not None:
        lines.append(f"Inference-Header-Content-Length: {header_length}")
    return "\r\n".join([*lines, "", ""]).encode() + body
