"""The inspector: a sandboxed process that lives for one package and says whether its model may be loaded.

It enters its sandbox before it sees a byte of the package; then: manifest, structural gate, a session on the very bytes
that are to be served, one run on the smallest input. The agent's side is :mod:`agent.inference.inspection`.
"""

import time
from collections.abc import Mapping

import msgspec
import numpy as np

from agent.errors import EdgeWardenError, VerificationError
from agent.inference.gate import check_model
from agent.inference.handover import IncomingFiles
from agent.inference.manifest import MANIFEST_FILE, ModelManifest, Range, TensorModality, parse_labels, parse_manifest
from agent.inference.package import MODEL_FILE
from agent.inference.report import InspectionReport, Refusal
from agent.inference.session import Session
from agent.inference.tensors import DATATYPES, Tensor
from agent.isolation.channel import Channel
from agent.isolation.child import Child
from agent.isolation.memfd import map_sealed
from agent.records import TensorSpec

__all__ = ["inspect_files", "main"]

_REPORT_CHUNK_BYTES = 1 << 15


def main(child: Child) -> None:
    """Run in the sandboxed child: receive the files, inspect, report, end."""
    child.enter_sandbox()
    channel = Channel(child.channel)
    incoming = IncomingFiles()
    complete = False
    while not complete:
        frames = channel.receive()
        if frames is None:
            return  # the agent does not want to know any more
        for frame in frames:
            complete = incoming.add(frame)
    report: InspectionReport | Refusal
    try:
        report = inspect_files(incoming.files)
    except VerificationError as error:
        report = Refusal(error.check, error.message)
    except EdgeWardenError as error:
        report = Refusal("trial", str(error))
    encoded = msgspec.json.encode(report)
    for start in range(0, len(encoded), _REPORT_CHUNK_BYTES):
        channel.send(encoded[start : start + _REPORT_CHUNK_BYTES])
    channel.close()


def inspect_files(fds: Mapping[str, int]) -> InspectionReport:
    """Inspect a package, given a sealed descriptor for each file. Synchronous and without any other I/O.

    Raises:
        VerificationError: a check of the manifest or the gate, ``labels``, ``missing-file``, ``model-load``, ``model-io``,
            ``model-output``.
        PeerError: the trial run fails.
    """
    for required in (MODEL_FILE, MANIFEST_FILE):
        if required not in fds:
            raise VerificationError("missing-file", f"the package has no {required}")
    files = {path: map_sealed(fd) for path, fd in fds.items()}
    # 1. The manifest, and its label file.
    manifest = parse_manifest(bytes(files[MANIFEST_FILE]))
    if manifest.labels is not None:
        if manifest.labels not in files:
            raise VerificationError("missing-file", f"the package has no {manifest.labels}")
        parse_labels(bytes(files[manifest.labels]))
    # 2. The gate; external data may lie in any other file.
    model = bytes(files[MODEL_FILE])
    data_files = {path: content for path, content in files.items() if path not in {MODEL_FILE, MANIFEST_FILE}}
    gate = check_model(model, {path: len(content) for path, content in data_files.items()}, manifest)
    # 3. A session, and one run.
    begin = time.monotonic_ns()
    session = Session(model, {path: data_files[path] for path in gate.external}, manifest)
    loaded = time.monotonic_ns()
    outputs = session.run(_smallest_inputs(manifest))
    done = time.monotonic_ns()
    return InspectionReport(
        gate=gate,
        outputs=tuple(TensorSpec(spec.name, spec.datatype, outputs[spec.name].shape) for spec in manifest.outputs),
        load_us=(loaded - begin) // 1000,
        run_us=(done - loaded) // 1000,
    )


def _smallest_inputs(manifest: ModelManifest) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    image = manifest.image
    ranges = manifest.modality.ranges if isinstance(manifest.modality, TensorModality) else {}
    for spec in manifest.inputs:
        sides = {}
        if image is not None and spec.name == image.input:
            sides = {image.layout.index("C"): image.channels}
            sides |= {image.layout.index("H"): image.height, image.layout.index("W"): image.width}
        shape = [size if size != -1 else sides.get(axis, 1) for axis, size in enumerate(spec.shape)]
        limits = ranges.get(spec.name, Range(0.0, 0.0))
        value = b"" if spec.datatype == "BYTES" else min(max(0.0, limits.low), limits.high)
        inputs[spec.name] = np.full(shape, value, dtype=DATATYPES[spec.datatype])
    return inputs
