"""Tensors in the Open Inference Protocol's words, and the values that carry a request and its answer.

Rules:

1. Every tensor is a numpy array. A ``BYTES`` tensor is an object array whose elements are ``bytes``, so that it has a
   shape like any other.
2. Binary form: the "binary tensor data" extension of the Open Inference Protocol v2: row-major, little-endian; a
   ``BYTES`` element is a little-endian u32 length and that many bytes; a ``BOOL`` is one byte, 0 or 1.
3. Bytes that a client sent are counted against shape and datatype before anything is allocated for them.
4. ``BF16`` is refused: numpy has no such type, and a silent cast would change what a client sent.
"""

import functools
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from agent.errors import PeerError

__all__ = [
    "DATATYPES",
    "MAX_ELEMENTS",
    "MAX_ELEMENT_BYTES",
    "MAX_RANK",
    "SALT_BYTES",
    "InferRequest",
    "InferResponse",
    "RequestedOutput",
    "Tensor",
    "datatype_of",
    "dtype_of",
    "element_count",
    "oip_binary",
    "salted_digest",
    "tensor_from_binary",
    "tensor_to_binary",
]

Tensor: TypeAlias = npt.NDArray[Any]
_Described: TypeAlias = tuple[str, str, tuple[int, ...], int]  # name, datatype, shape, bytes

MAX_RANK = 16  # dimensions
MAX_ELEMENTS = 1 << 28  # elements a tensor: 1 GiB of FP32
MAX_ELEMENT_BYTES = 1 << 24  # bytes an element of a BYTES tensor
SALT_BYTES = 32
_COPIED_BYTES = 1 << 14  # up to here one call on a copy is quicker than several

_LENGTH = struct.Struct("<I")

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output that a client asks for; ``parameters`` are its own (for example ``binary_data``)."""

    name: str
    parameters: Mapping[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True):
    """One request to a model, decoded. ``outputs`` empty means all of them."""

    id: str
    inputs: Mapping[str, Tensor]
    parameters: Mapping[str, Any] = {}
    outputs: tuple[RequestedOutput, ...] = ()


class InferResponse(msgspec.Struct, frozen=True):
    """What a model answered."""

    model_name: str
    model_version: str
    id: str
    outputs: Mapping[str, Tensor]
    parameters: Mapping[str, Any] = {}


def dtype_of(datatype: str, where: str = "datatype") -> np.dtype[Any]:
    """Return the numpy type of an OIP datatype.

    Raises:
        PeerError: 400 ``datatype`` for one that is unknown or not served.
    """
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        raise PeerError(400, "datatype", f"{where}: {datatype[:32]!r} is not one of {', '.join(DATATYPES)}")
    return dtype


def datatype_of(tensor: Tensor) -> str:
    """Return the OIP datatype of an array.

    Raises:
        ValueError: the protocol has no datatype for it; a programming error, for arrays come from this agent.
    """
    try:
        return _NAMES[tensor.dtype]
    except KeyError:
        raise ValueError(f"no Open Inference Protocol datatype for {tensor.dtype}") from None


def element_count(shape: Sequence[int], where: str = "shape") -> int:
    """Return the product of the dimensions.

    Raises:
        PeerError: 400 ``shape`` for a negative dimension, more than :data:`MAX_RANK` dimensions or more than
            :data:`MAX_ELEMENTS` elements.
    """
    if len(shape) > MAX_RANK:
        raise PeerError(400, "shape", f"{where}: {len(shape)} dimensions, more than {MAX_RANK}")
    count = math.prod(shape)
    # Each dimension is bounded too: [0, 2**70] has no elements and still is no shape of an array.
    if count > MAX_ELEMENTS or (shape and (min(shape) < 0 or max(shape) > MAX_ELEMENTS)):
        raise PeerError(400, "shape", f"{where}: dimensions must be 0 or more, at most {MAX_ELEMENTS} elements in all")
    return count


def tensor_from_binary(
    datatype: str, shape: Sequence[int], data: bytes | memoryview, where: str = "tensor data"
) -> Tensor:
    """Decode the binary form; an array over ``data`` itself, read-only, except for ``BYTES``.

    Raises:
        PeerError: 400, when the bytes are not exactly that many elements of that datatype; ``where`` begins its text.
    """
    dtype = dtype_of(datatype, where)
    count = element_count(shape, where)
    if dtype.hasobject:
        return _split_elements(data, count, where).reshape(shape)
    if len(data) != count * dtype.itemsize:
        raise PeerError(
            400, "length", f"{where}: {len(data)} bytes, but {datatype} {list(shape)} needs {count * dtype.itemsize}"
        )
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise PeerError(400, "value", f"{where}: a BOOL is a byte 0 or 1")
    return np.frombuffer(data, dtype).reshape(shape)


def _split_elements(data: bytes | memoryview, count: int, where: str) -> Tensor:
    if len(data) < count * _LENGTH.size:
        raise PeerError(400, "length", f"{where}: {len(data)} bytes can't hold {count} BYTES elements")
    elements = np.empty(count, dtype=object)
    view = memoryview(data)
    at = 0
    for index in range(count):
        if len(view) - at < _LENGTH.size:
            raise PeerError(400, "length", f"{where}: the length of element {index} is cut short")
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if length > min(len(view) - at, MAX_ELEMENT_BYTES):
            raise PeerError(400, "length", f"{where}: element {index} claims {length} bytes, more than there may be")
        elements[index] = bytes(view[at : at + length])
        at += length
    if at != len(view):
        raise PeerError(400, "length", f"{where}: {len(view) - at} bytes follow the last element")
    return elements


def tensor_to_binary(tensor: Tensor) -> bytes:
    """Encode a tensor in the protocol's binary form."""
    if not tensor.dtype.hasobject:
        return tensor.tobytes()
    return b"".join(part for element in tensor.flat for part in (_LENGTH.pack(len(element)), element))


def oip_binary(tensors: Mapping[str, Tensor]) -> bytes:
    """Encode tensors as one string of bytes that stands for exactly these names, datatypes, shapes and values.

    A JSON list in canonical form (RFC 8785), sorted by name, of what the protocol's header says of each tensor; after
    it their binary forms in the same order.
    """
    return b"".join(_binary_parts(tensors))


def salted_digest(salt: bytes, tensors: Mapping[str, Tensor]) -> str:
    """Return ``SHA-256(salt || oip_binary(tensors))`` in hex; large parts are not copied for it.

    Raises:
        ValueError: the salt is not :data:`SALT_BYTES` long.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt has {SALT_BYTES} bytes")
    parts = _binary_parts(tensors)
    if sum(map(len, parts)) <= _COPIED_BYTES:
        return hashlib.sha256(b"".join((salt, *parts))).hexdigest()
    digest = hashlib.sha256(salt)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _binary_parts(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    encoded: list[bytes | memoryview] = []
    described: list[_Described] = []
    for name, tensor in sorted(tensors.items()):
        data = tensor_to_binary(tensor) if tensor.dtype.hasobject else _octets(tensor)
        encoded.append(data)
        described.append((name, datatype_of(tensor), tensor.shape, len(data)))
    return [_header(tuple(described)), *encoded]


def _octets(tensor: Tensor) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


@functools.lru_cache(maxsize=256)  # most models take and give one shape
def _header(described: tuple[_Described, ...]) -> bytes:
    header = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
        for name, datatype, shape, size in described
    ]
    return orjson.dumps(header, option=orjson.OPT_SORT_KEYS)
