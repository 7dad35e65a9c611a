"""Tensors as JSON lists, as the Open Inference Protocol v2 writes them.

Rules:

1. Data is flat, or nested exactly as the shape says; the count of elements is the shape's product, known before an array
   is made.
2. A number must be representable: an integer that does not fit, a float or a boolean where an integer is due, and a float
   that becomes infinite are refused, never wrapped, cut or rounded to another kind.
3. A BOOL is ``true`` or ``false``; a BYTES element is a string and stands for its UTF-8.
4. What JSON cannot carry (NaN, infinities, octets that are not UTF-8) is not sent in JSON.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from agent.arrays import all_finite
from agent.errors import PeerError
from agent.inference.tensors import Tensor, dtype_of, element_count

__all__ = ["check_finite", "tensor_from_json", "tensor_to_json"]

_C_FLOATS = frozenset("fd")  # type codes that numpy and the standard library's arrays share


def tensor_from_json(
    data: object, datatype: str, shape: list[int], where: str, *, allow_nonfinite: bool = False
) -> Tensor:
    """Make an array of parsed JSON.

    Args:
        data: what stands under ``data``.
        datatype: an OIP datatype.
        shape: the dimensions, integers.
        where: the tensor's place in the request, for errors.
        allow_nonfinite: whether NaN and infinities, where the JSON parser let them pass, are values of this model.

    Raises:
        PeerError: 400.
    """
    dtype = dtype_of(datatype, where)
    count = element_count(shape, where)
    if not isinstance(data, list):
        raise _bad(where, "must be a list")
    kinds = set(map(type, data))
    if list in kinds:
        data = _flatten(data, shape, where)
        kinds = set(map(type, data))
    if len(data) != count:
        raise _bad(where, f"has {len(data)} elements, but its shape has {count}")
    if dtype.kind == "f":
        flat = _floats(data, kinds, dtype, where, allow_nonfinite=allow_nonfinite)
    else:
        flat = _OTHERS[dtype.kind](data, kinds, dtype, where)
    return flat if len(shape) == 1 else flat.reshape(shape)


def _flatten(data: list[Any], shape: list[int], where: str) -> list[Any]:
    if not shape or len(data) != shape[0]:
        raise _bad(where, "is not nested as its shape says")
    for depth, dimension in enumerate(shape[1:], start=1):
        if not {list}.issuperset(map(type, data)) or any(len(member) != dimension for member in data):
            raise _bad(where, f"is not nested as its shape says at depth {depth}")
        data = list(chain.from_iterable(data))
    return data


def _floats(data: list[Any], kinds: set[type], dtype: np.dtype[Any], where: str, *, allow_nonfinite: bool) -> Tensor:
    if not kinds <= {int, float}:
        raise _bad(where, "must hold numbers only")
    try:
        made = _made(data, dtype)
    except OverflowError as error:
        raise _bad(where, "has an integer that is too large for a float") from error
    if all_finite(made):
        return made
    finite = np.isfinite(made)
    if not finite.all() and not (allow_nonfinite and np.array_equal(finite, np.isfinite(np.array(data, np.float64)))):
        raise _bad(where, f"has a number that is not finite as {dtype.name}")
    return made


def _made(data: list[Any], dtype: np.dtype[Any]) -> Tensor:
    """Make a float array; what overflows becomes infinite, without a warning."""
    if dtype.char in _C_FLOATS:
        return np.frombuffer(array(dtype.char, data), dtype)
    with np.errstate(all="ignore"):
        return np.array(data, dtype)


def _integers(data: list[Any], kinds: set[type], dtype: np.dtype[Any], where: str) -> Tensor:
    if not kinds <= {int}:
        raise _bad(where, "must hold integers only")
    try:
        return np.array(data, dtype)
    except OverflowError as error:
        raise _bad(where, f"has an integer that does not fit {dtype.name}") from error


def _booleans(data: list[Any], kinds: set[type], dtype: np.dtype[Any], where: str) -> Tensor:
    if not kinds <= {bool}:
        raise _bad(where, "must hold true and false only")
    return np.array(data, dtype)


def _texts(data: list[Any], kinds: set[type], dtype: np.dtype[Any], where: str) -> Tensor:
    if not kinds <= {str}:
        raise _bad(where, "must hold texts only; send other octets as binary data")
    return np.fromiter(map(str.encode, data), dtype, len(data))


_OTHERS: Mapping[str, Callable[[list[Any], set[type], np.dtype[Any], str], Tensor]] = {
    "i": _integers,
    "u": _integers,
    "b": _booleans,
    "O": _texts,
}


def tensor_to_json(tensor: Tensor, name: str) -> object:
    """Return a tensor's flat data as what orjson encodes (with ``OPT_SERIALIZE_NUMPY``).

    NaN and infinities become ``null`` there: :func:`check_finite` is for the caller that finds one.

    Raises:
        PeerError: 400, for octets that JSON cannot carry; the caller may ask for the binary form.
    """
    if tensor.dtype.hasobject:
        try:
            return [element.decode() for element in tensor.flat]
        except UnicodeDecodeError as error:
            raise _not_json(name, "octets that are not UTF-8") from error
    return np.ascontiguousarray(tensor).reshape(-1)


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse an output that JSON cannot carry.

    Raises:
        PeerError: 400.
    """
    if tensor.dtype.kind == "f" and not all_finite(tensor):
        raise _not_json(name, "NaN or infinities")


def _not_json(name: str, what: str) -> PeerError:
    return PeerError(400, "not_json", f"output {name!r} holds {what}, which JSON cannot carry: ask for binary_data")


def _bad(where: str, what: str) -> PeerError:
    return PeerError(400, "malformed", f"{where}.data: {what}")
