"""Verified load of a large package against ``openssl dgst -sha256`` of the same bytes.

``verify``: every file is read once into sealed memory and hashed on the way, then the signature is verified over the digests.
``session``: the same, and an onnxruntime session is built from the sealed memory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251 -- as the zygote sets it; must stand before the imports below

from agent.flows.loading import load_model
from agent.inference.package import Package, read_package
from agent.inference.signing import TrustStore, verify_package
from tests.support.models import new_key, public_pem, sign_directory
from tools.example_models import write_package

__all__ = ["LoadFigures", "measure"]

WIDTH = 4096
LAYERS = 5  # of WIDTH * WIDTH floats each: 320 MiB, about 336 MB
DATA = "weights.bin"


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Medians in seconds, and the spread of the ratio of openssl's time to ours (more is better for us)."""

    megabytes: float
    openssl_s: float
    verify_s: float
    session_s: float
    verify_ratios: tuple[float, ...]
    session_ratios: tuple[float, ...]


def measure(directory: Path, rounds: int) -> LoadFigures:
    """Write, sign and load a package; rounds alternate between openssl and the agent's code, with the files in the page cache."""
    package = _write(directory / "large" / "1")
    key = new_key()
    sign_directory(package, key)
    trust = TrustStore.from_pem(public_pem(key))
    data = package / DATA
    megabytes = data.stat().st_size / 1e6
    openssl, verify, session = [], [], []
    for _ in range(rounds):
        openssl.append(_time(lambda: _openssl(data)))
        verify.append(_time(lambda: _load(package, trust, session=False)))
        session.append(_time(lambda: _load(package, trust, session=True)))
    return LoadFigures(
        megabytes,
        statistics.median(openssl),
        statistics.median(verify),
        statistics.median(session),
        tuple(one / other for one, other in zip(openssl, verify, strict=True)),
        tuple(one / other for one, other in zip(openssl, session, strict=True)),
    )


def _time(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _openssl(path: Path) -> None:
    subprocess.run(["openssl", "dgst", "-sha256", str(path)], check=True, capture_output=True)


def _load(directory: Path, trust: TrustStore, *, session: bool) -> None:
    package: Package = read_package(directory)
    try:
        signer = verify_package(package, trust)
        if session:
            fds = {path: file.fd for path, file in package.files.items()}
            load_model(fds, digest=package.sha256, signer=str(signer), threads=1)
    finally:
        package.close()


def _write(directory: Path) -> Path:
    """Write a chain of matrix products whose weights are external data."""
    initializers, nodes = [], []
    size = WIDTH * WIDTH * 4
    for layer in range(LAYERS):
        weights = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
        weights.data_location = TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", layer * size), ("length", size)):
            weights.external_data.add(key=key, value=str(value))
        initializers.append(weights)
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"h{layer + 1}"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info(f"h{LAYERS}", TensorProto.FLOAT, ["n", WIDTH])],
        initializers,
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    manifest = {
        "name": "large",
        "version": "1",
        "inputs": [{"name": "h0", "datatype": "FP32", "shape": [-1, WIDTH]}],
        "outputs": [{"name": f"h{LAYERS}", "datatype": "FP32", "shape": [-1, WIDTH]}],
        "modality": {"kind": "tensor"},
    }
    write_package(directory, model.SerializeToString(), manifest, [])
    source = np.random.default_rng(7)
    with (directory / DATA).open("wb") as file:
        for _ in range(LAYERS):
            file.write(source.standard_normal((WIDTH, WIDTH), np.float32).tobytes())
    return directory
