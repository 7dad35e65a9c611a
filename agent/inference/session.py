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

from agent.arrays import all_finite
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
        self._outputs = {spec.name: (DATATYPES[spec.datatype], spec.shape) for spec in manifest.outputs}
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
        # Its Python method of that name checks again what validate() has checked, and would fall back to another provider.
        self._run = self._session._sess.run  # noqa: SLF001 -- the native method has no public name
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = {node.name for node in self._session.get_outputs()}
        if inputs != {spec.name for spec in manifest.inputs} or not outputs >= self._outputs.keys():
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
        wanted = tuple(outputs or self._outputs)
        for name in wanted:
            if name not in self._outputs:
                raise PeerError(400, "output", f"outputs[{name[:64]}]: the model has {', '.join(self._outputs)}")
        feed = {name: _native_form(name, tensor) for name, tensor in inputs.items()}
        try:
            results = self._run(wanted, feed, None)
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
            tensor = inputs.get(spec.name)
            if tensor is None:
                raise _bad("input", spec, "missing")
            if tensor.dtype != DATATYPES[spec.datatype]:
                raise _bad("datatype", spec, f"is {datatype_of(tensor)}, the model takes {spec.datatype}")
            if not _fits(tensor.shape, spec.shape) or 0 in tensor.shape:
                takes = f"the model takes {list(spec.shape)} (-1 is 1 or more)"
                raise _bad("shape", spec, f"is {list(tensor.shape)}, {takes}")
            self._check_values(spec, tensor)
        if len(inputs) != len(self.manifest.inputs):
            unknown = sorted(set(inputs) - {spec.name for spec in self.manifest.inputs})
            raise PeerError(400, "input", f"inputs[{unknown[0][:64]}]: the model has no such input")

    def batch(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many items a request carries: the leading dimension, where the manifest leaves it open."""
        for spec in self.manifest.inputs:
            if spec.shape[:1] == (-1,) and spec.name in inputs and inputs[spec.name].ndim:
                return int(inputs[spec.name].shape[0])
        return 1

    def _check_values(self, spec: TensorSpec, tensor: Tensor) -> None:
        if tensor.dtype.hasobject:
            return
        if self._finite and tensor.dtype.kind == "f" and not all_finite(tensor):
            raise _bad("value", spec, "NaN and infinite values are not allowed")
        limits = self._ranges.get(spec.name)
        if limits is not None and (float(tensor.min()) < limits.low or float(tensor.max()) > limits.high):
            raise _bad("value", spec, f"values must lie within {limits.low:g}..{limits.high:g}")

    def _checked(self, name: str, result: Any) -> Tensor:  # noqa: ANN401 -- whatever the model gives
        dtype, shape = self._outputs[name]
        if not isinstance(result, np.ndarray):
            raise VerificationError("model-output", f"{name} is not a tensor")
        tensor: Tensor = result
        if tensor.dtype.hasobject or tensor.dtype.kind == "U":
            tensor = np.empty(result.shape, dtype=object)
            tensor.reshape(-1)[:] = [str(element).encode() for element in result.flat]
        if tensor.dtype != dtype or not _fits(tensor.shape, shape):
            raise VerificationError(
                "model-output", f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
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
        flags = tensor.flags
        return tensor if flags.c_contiguous and flags.aligned else np.require(tensor, requirements=["C", "A"])
    strings = np.empty(tensor.shape, dtype=object)
    try:
        strings.reshape(-1)[:] = [element.decode() for element in tensor.flat]
    except UnicodeDecodeError as error:
        raise PeerError(400, "value", f"inputs[{name}]: the model takes UTF-8 text") from error
    return strings


def _fits(actual: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if len(actual) != len(expected):
        return False
    for have, want in zip(actual, expected, strict=True):  # noqa: SIM110 -- twice as quick as all() for a few dimensions
        if want not in (-1, have):
            return False
    return True


def _bad(reason: str, spec: TensorSpec, what: str) -> PeerError:
    return PeerError(400, reason, f"inputs[{spec.name}]: {what}")
