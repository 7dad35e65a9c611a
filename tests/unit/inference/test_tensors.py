"""Tensors and their binary form."""

import hashlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import PeerError
from agent.inference.tensors import (
    DATATYPES,
    MAX_ELEMENT_BYTES,
    MAX_ELEMENTS,
    datatype_of,
    element_count,
    oip_binary,
    salted_digest,
    tensor_from_binary,
    tensor_to_binary,
)

_FIXED = sorted(name for name in DATATYPES if name != "BYTES")


@given(data=st.data(), name=st.sampled_from(_FIXED))
def test_fixed_size_round_trip(data, name):
    """What is encoded decodes to the same datatype, shape and bits, NaN included."""
    array = data.draw(hnp.arrays(DATATYPES[name], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    again = tensor_from_binary(name, array.shape, tensor_to_binary(array))
    assert again.shape == array.shape
    assert datatype_of(again) == name
    assert again.tobytes() == array.tobytes()


@given(elements=st.lists(st.binary(max_size=20), max_size=12))
def test_bytes_round_trip(elements):
    """BYTES elements survive, the empty ones and the zero bytes too."""
    array = np.empty((1, len(elements)), dtype=object)
    array[0, :] = elements
    again = tensor_from_binary("BYTES", (1, len(elements)), tensor_to_binary(array))
    assert again.shape == (1, len(elements))
    assert list(again[0]) == elements


@given(
    name=st.text(max_size=8) | st.sampled_from([*DATATYPES, "BF16"]),
    shape=st.lists(st.integers(-3, 2**70), max_size=20) | st.lists(st.integers(0, 4), max_size=3),
    data=st.binary(max_size=64),
)
def test_untrusted_bytes_raise_nothing_but_peer_errors(name, shape, data):
    """Whatever a client sends is an array of the stated shape, or a 400."""
    array, refusal = None, None
    try:
        array = tensor_from_binary(name, shape, data, "inputs[0]")
    except PeerError as error:
        refusal = error
    if refusal is None:
        assert array is not None
        assert array.shape == tuple(shape)
    else:
        assert refusal.status == 400
        assert str(refusal).startswith("inputs[0]")


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "reason"),
    [
        ("BF16", [1], b"\0\0", "datatype"),
        ("FP32", [2], b"\0" * 7, "length"),
        ("FP32", [2], b"\0" * 9, "length"),
        ("FP32", [-1], b"", "shape"),
        ("FP32", [MAX_ELEMENTS, 2], b"", "shape"),
        ("FP32", [0, 2**70], b"", "shape"),
        ("FP32", [1] * 17, b"\0" * 4, "shape"),
        ("BOOL", [2], b"\x01\x02", "value"),
        ("BYTES", [MAX_ELEMENTS], b"", "length"),
        ("BYTES", [1], struct.pack("<I", 5) + b"four", "length"),
        ("BYTES", [1], struct.pack("<I", 2) + b"four", "length"),
        ("BYTES", [2], struct.pack("<I", 4) + b"four", "length"),
        ("BYTES", [2], struct.pack("<I", 4) + b"four" + b"\0\0", "length"),
        ("BYTES", [1], struct.pack("<I", MAX_ELEMENT_BYTES + 1) + b"\0" * (MAX_ELEMENT_BYTES + 1), "length"),
    ],
)
def test_wrong_binary_data_is_named(datatype, shape, data, reason):
    """Every way in which data can disagree with its header has its own reason."""
    with pytest.raises(PeerError) as caught:
        tensor_from_binary(datatype, shape, data)
    assert caught.value.reason == reason


def test_element_count_of_scalar_is_one():
    """A shape without dimensions holds one element."""
    assert element_count([]) == 1


def test_oip_binary_is_header_then_data():
    """The digest's preimage is the protocol's own header and data, sorted by name."""
    text = np.array([b"hi"], dtype=object)
    encoded = oip_binary({"b": text, "a": np.array([[1, 2]], dtype=np.int16)})
    header = (
        b'[{"datatype":"INT16","name":"a","parameters":{"binary_data_size":4},"shape":[1,2]},'
        b'{"datatype":"BYTES","name":"b","parameters":{"binary_data_size":6},"shape":[1]}]'
    )
    assert encoded == header + b"\x01\0\x02\0" + b"\x02\0\0\0hi"
    assert json.loads(header)


@given(
    st.dictionaries(
        st.text(alphabet="abc", max_size=3),
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
        max_size=3,
    )
)
def test_salted_digest_matches_its_definition(tensors):
    """The streamed digest equals SHA-256 over salt and encoding."""
    salt = bytes(range(32))
    assert salted_digest(salt, tensors) == hashlib.sha256(salt + oip_binary(tensors)).hexdigest()


def test_digest_sees_strided_arrays_by_value():
    """A transposed view and its copy have one digest; the untransposed has another."""
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    salt = bytes(32)
    assert salted_digest(salt, {"x": array.T}) == salted_digest(salt, {"x": array.T.copy()})
    assert salted_digest(salt, {"x": array.T}) != salted_digest(salt, {"x": array.reshape(3, 2)})


def test_short_salt_is_refused():
    """A salt that could be guessed is a programming error."""
    with pytest.raises(ValueError, match="32 bytes"):
        salted_digest(b"short", {})


def test_array_without_datatype_is_refused():
    """A complex array has no name in the protocol."""
    with pytest.raises(ValueError, match="complex"):
        datatype_of(np.zeros(1, dtype=np.complex64))
