"""The gate's rules for tensors inside a model file, and for those whose data lies in other files.

Rules:

1. A tensor holds exactly the data that its type and shape need: a shape that promises more is a trap for whoever
   allocates by it.
2. External data is named by a plain relative path of a listed file, with an offset and a length inside it. (A runtime
   takes some other values of ``location`` for an address in memory.)
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import onnx

from agent.errors import VerificationError

__all__ = ["MAX_ELEMENTS", "MAX_RANK", "MAX_TENSORS", "Weights", "text"]

MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 33  # of one tensor
MAX_RANK = 16

_T = onnx.TensorProto
_BITS = {
    _T.FLOAT: 32, _T.DOUBLE: 64, _T.FLOAT16: 16, _T.BFLOAT16: 16, _T.BOOL: 8,
    _T.INT8: 8, _T.INT16: 16, _T.INT32: 32, _T.INT64: 64,
    _T.UINT8: 8, _T.UINT16: 16, _T.UINT32: 32, _T.UINT64: 64,
    _T.INT4: 4, _T.UINT4: 4,
    _T.FLOAT8E4M3FN: 8, _T.FLOAT8E4M3FNUZ: 8, _T.FLOAT8E5M2: 8, _T.FLOAT8E5M2FNUZ: 8,
}  # fmt: skip
_LOCATION = re.compile(r"[A-Za-z0-9._+@=,~:%#-]+(/[A-Za-z0-9._+@=,~:%#-]+)*")
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_NUMBER = re.compile(r"[0-9]{1,18}")


class Weights:
    """Checks tensors and adds up what it saw.

    Args:
        sizes: path to size in bytes of the files that may hold external data.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.elements = 0
        self.external: set[str] = set()
        self._sizes = sizes
        self._tensors = 0

    def check(self, tensor: Any, *, may_be_external: bool) -> None:  # noqa: ANN401 -- onnx has no types
        """Check one tensor.

        Raises:
            VerificationError: ``tensor-count``, ``tensor-shape``, ``tensor-type``, ``tensor-size``, ``external-data``.
        """
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise VerificationError("tensor-count", f"more than {MAX_TENSORS} tensors")
        name = tensor.name[:80]
        if len(tensor.dims) > MAX_RANK or any(dim < 0 for dim in tensor.dims):
            raise VerificationError("tensor-shape", f"{name!r} has an impossible shape")
        count = math.prod(tensor.dims)
        if count > MAX_ELEMENTS or tensor.HasField("segment"):
            raise VerificationError("tensor-shape", f"{name!r} has {count} elements, or is cut into segments")
        self.elements += count
        if tensor.data_location == _T.EXTERNAL or tensor.external_data:
            if not may_be_external:
                raise VerificationError("external-data", f"{name!r} is no initializer and has external data")
            self._check_external(tensor, _size(tensor, count))
        else:
            _check_inline(tensor, count)

    def check_sparse(self, sparse: Any) -> None:  # noqa: ANN401 -- onnx has no types
        """Check a sparse tensor: its parts, and the dense shape that it stands for."""
        self.check(sparse.values, may_be_external=False)
        self.check(sparse.indices, may_be_external=False)
        # A runtime makes it dense: that must not cost more than a dense tensor of this file might.
        if any(dim < 0 for dim in sparse.dims) or math.prod(sparse.dims) > MAX_ELEMENTS >> 6:
            raise VerificationError("tensor-shape", f"{sparse.values.name[:80]!r} has an impossible dense shape")

    def _check_external(self, tensor: Any, size: int) -> None:  # noqa: ANN401 -- onnx has no types
        name = tensor.name[:80]
        # 1. Each key once: readers differ in which of two they take.
        entries = {text(entry.key): text(entry.value) for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data) or not entries.keys() <= _EXTERNAL_KEYS:
            raise VerificationError("external-data", f"{name!r} has keys twice or unknown ones")
        # 2. A listed file.
        location = entries.get("location", "")
        if not _LOCATION.fullmatch(location) or ".." in location.split("/") or location not in self._sizes:
            raise VerificationError("external-data", f"{name!r} lies in {location[:80]!r}, no data file of the package")
        # 3. Inside it.
        offset, length = entries.get("offset", "0"), entries.get("length", str(size))
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(length)):
            raise VerificationError("external-data", f"{name!r}: offset and length must be numbers")
        if int(length) != size or int(offset) + size > self._sizes[location]:
            raise VerificationError("external-data", f"{name!r}: {size} bytes at {offset} don't lie inside {location}")
        self.external.add(location)


def text(value: str | bytes) -> str:
    """Return a string field; protobuf hands one that is not UTF-8 over as bytes.

    Raises:
        VerificationError: ``text-encoding``.
    """
    if isinstance(value, bytes):
        raise VerificationError("text-encoding", f"{value[:80]!r} is not UTF-8")
    return value


def _size(tensor: Any, count: int) -> int:  # noqa: ANN401 -- onnx has no types
    """Return the bytes that a tensor's data takes."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise VerificationError(
            "tensor-type", f"{tensor.name[:80]!r} has type {tensor.data_type}, which is not allowed"
        )
    return (count * bits + 7) // 8


def _check_inline(tensor: Any, count: int) -> None:  # noqa: ANN401 -- onnx has no types
    if tensor.data_type == _T.STRING:
        held, needed = len(tensor.string_data), count
    elif tensor.HasField("raw_data"):
        held, needed = len(tensor.raw_data), _size(tensor, count)
    else:
        size = _size(tensor, count)
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        held = sum(map(len, fields))
        needed = size if tensor.data_type in {_T.INT4, _T.UINT4} else count
    if held != needed:
        raise VerificationError(
            "tensor-size", f"{tensor.name[:80]!r} holds {held} units of data, its shape needs {needed}"
        )
