"""The only door to onnxruntime.

Rules:

1. No phone home: ``ORT_DISABLE_TELEMETRY=1`` must stand in the environment before onnxruntime is imported; the parent
   process sets it, and this module refuses to be imported without it.
2. The model and its external data come as bytes, from sealed memory. onnxruntime gets no path, writes no file
   (``optimized_model_filepath`` stays unset) and reads the ONNX format only, which is what the gate has seen.
3. Inputs are validated against the manifest before they reach onnxruntime, outputs before they leave.
"""

import os
from collections.abc import Mapping, Sequence
from mmap import mmap
from typing import Any

import numpy as np

from agent.errors import HostError, PeerError, VerificationError
from agent.inference.manifest import ModelManifest, TensorModality
from agent.inference.tensors import DATATYPES, Tensor, datatype_of
from agent.records import TensorSpec

if os.environ.get("ORT_DISABLE_TELEMETRY") != "1":  # noqa: TID251 -- asserted, not configured: rule 1
    raise HostError("ORT_DISABLE_TELEMETRY=1 must be in the environment before onnxruntime is imported")

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native

__all__ = ["Session"]

onnxruntime.disable_telemetry_events()

_LOG_ERRORS = 3  # onnxruntime's severity "error"
# Its own exceptions share no root but Exception; the others are what the binding raises for what it can't convert.
_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(_native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    MemoryError,
)


class Session:
    """One loaded model.

    Args:
        model: ``model.onnx``.
        externals: external data, by the ``location`` that the graph names; borrowed for the length of the call.
        manifest: what the model takes and gives.
        threads: onnxruntime's compute threads, the calling one included.

    Raises:
        VerificationError: ``model-load``, when onnxruntime refuses it, or ``model-io``, when its inputs and outputs are
            not the manifest's.
    """

    def __init__(
        self,
        model: bytes,
        externals: Mapping[str, bytes | mmap],
        manifest: ModelManifest,
        threads: int = 1,
    ) -> None:
        self.manifest = manifest
        self._outputs = tuple(spec.name for spec in manifest.outputs)
        self._finite = not (isinstance(manifest.modality, TensorModality) and manifest.modality.allow_nonfinite)
        self._ranges = manifest.modality.ranges if isinstance(manifest.modality, TensorModality) else {}
        try:
            self._session = onnxruntime.InferenceSession(
                model,
                sess_options=_options(externals, threads),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
                read_config_from_model=0,
            )
        except _ERRORS as error:
            raise VerificationError("model-load", " ".join(str(error).split())[:400]) from error
        # The binding would keep a second copy of the whole model for as long as the session lives.
        self._session._model_bytes = None  # noqa: SLF001 -- no public way to let go of it
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = {node.name for node in self._session.get_outputs()}
        if inputs != {spec.name for spec in manifest.inputs} or not outputs >= set(self._outputs):
            raise VerificationError("model-io", f"the graph has inputs {sorted(inputs)} and outputs {sorted(outputs)}")

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] = ()) -> dict[str, Tensor]:
        """Run the model.

        Args:
            inputs: an array for each input of the manifest.
            outputs: names of those wanted, in that order; empty for all.

        Raises:
            PeerError: 400, when an input or a wanted output is not as the manifest says, or when the model can't compute
                these inputs.
            VerificationError: ``model-output``, when the model breaks its own manifest.
        """
        self.validate(inputs)
        wanted = tuple(outputs) or self._outputs
        for name in wanted:
            if name not in self._outputs:
                raise PeerError(400, "output", f"outputs[{name[:64]}]: the model has {', '.join(self._outputs)}")
        feed = {name: _native_form(name, tensor) for name, tensor in inputs.items()}
        try:
            results = self._session.run(wanted, feed)
        except _ERRORS as error:
            # The cause names nodes and shapes of the graph: for the log of the node, not for the caller.
            raise PeerError(400, "infer", "inputs: the model can't compute these values and shapes together") from error
        return {name: self._checked(name, result) for name, result in zip(wanted, results, strict=True)}

    def validate(self, inputs: Mapping[str, Tensor]) -> None:
        """Check names, datatypes, shapes and values against the manifest.

        Raises:
            PeerError: 400, saying what and where.
        """
        for spec in self.manifest.inputs:
            where = f"inputs[{spec.name}]"
            tensor = inputs.get(spec.name)
            if tensor is None:
                raise PeerError(400, "input", f"{where}: missing")
            if tensor.dtype != DATATYPES[spec.datatype]:
                raise PeerError(400, "datatype", f"{where}: is {datatype_of(tensor)}, the model takes {spec.datatype}")
            if not _fits(tensor.shape, spec.shape) or 0 in tensor.shape:
                raise PeerError(
                    400,
                    "shape",
                    f"{where}: is {list(tensor.shape)}, the model takes {list(spec.shape)} (-1 is 1 or more)",
                )
            self._check_values(where, spec, tensor)
        if len(inputs) != len(self.manifest.inputs):
            unknown = sorted(set(inputs) - {spec.name for spec in self.manifest.inputs})
            raise PeerError(400, "input", f"inputs[{unknown[0][:64]}]: the model has no such input")

    def batch(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many items a request carries: the leading dimension, where the manifest leaves it open."""
        for spec in self.manifest.inputs:
            if spec.shape[:1] == (-1,) and spec.name in inputs and inputs[spec.name].ndim:
                return int(inputs[spec.name].shape[0])
        return 1

    def _check_values(self, where: str, spec: TensorSpec, tensor: Tensor) -> None:
        limits = self._ranges.get(spec.name)
        if tensor.dtype.hasobject or (limits is None and not (self._finite and tensor.dtype.kind == "f")):
            return
        # NaN propagates through both, so two passes at memory speed tell everything.
        low, high = float(tensor.min()), float(tensor.max())
        if self._finite and not (np.isfinite(low) and np.isfinite(high)):
            raise PeerError(400, "value", f"{where}: NaN and infinite values are not allowed")
        if limits is not None and (low < limits.low or high > limits.high):
            raise PeerError(400, "value", f"{where}: values must lie within {limits.low:g}..{limits.high:g}")

    def _checked(self, name: str, result: Any) -> Tensor:  # noqa: ANN401 -- whatever the model gives
        spec = next(spec for spec in self.manifest.outputs if spec.name == name)
        if not isinstance(result, np.ndarray):
            raise VerificationError("model-output", f"{name} is not a tensor")
        tensor: Tensor = result
        if tensor.dtype.hasobject or tensor.dtype.kind == "U":
            tensor = np.empty(result.shape, dtype=object)
            tensor.reshape(-1)[:] = [str(element).encode() for element in result.flat]
        if tensor.dtype != DATATYPES[spec.datatype] or not _fits(tensor.shape, spec.shape):
            raise VerificationError(
                "model-output", f"{name} is {tensor.dtype} {list(tensor.shape)}, not {spec.datatype} {list(spec.shape)}"
            )
        return tensor


def _options(externals: Mapping[str, bytes | mmap], threads: int) -> Any:  # noqa: ANN401 -- onnxruntime has no types
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # External data that was not handed over would be looked for in the working directory; below a device nothing is.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    if externals:
        names = list(externals)
        options.add_external_initializers_from_files_in_memory(
            names, [externals[name] for name in names], [len(externals[name]) for name in names]
        )
    return options


def _native_form(name: str, tensor: Tensor) -> Tensor:
    """Return what onnxruntime takes: contiguous and aligned; its strings are text."""
    if not tensor.dtype.hasobject:
        return np.require(tensor, requirements=["C", "A"])
    strings = np.empty(tensor.shape, dtype=object)
    try:
        strings.reshape(-1)[:] = [element.decode() for element in tensor.flat]
    except UnicodeDecodeError as error:
        raise PeerError(400, "value", f"inputs[{name}]: the model takes UTF-8 text") from error
    return strings


def _fits(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(actual) == len(expected) and all(want in {-1, have} for have, want in zip(actual, expected, strict=True))
