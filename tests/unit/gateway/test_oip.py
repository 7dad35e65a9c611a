"""The wire format against real tritonclient, a table of bad requests, and generated ones."""

import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import PeerError
from agent.gateway.oip import (
    HEADER_LENGTH,
    WireLimits,
    check_content_type,
    encode_infer_response,
    model_metadata,
    parse_header_length,
    parse_infer_request,
    server_metadata,
)
from agent.inference.tensors import DATATYPES, InferRequest, InferResponse, RequestedOutput, Tensor
from agent.records import TensorSpec
from tests.support.outcome import value_or_refusal

_NUMERIC = sorted(set(DATATYPES) - {"BYTES"})
_SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)


_utf8 = st.text(max_size=6).map(str.encode)


@st.composite
def _tensors(draw):
    """A tensor of any datatype; of finite numbers, for JSON carries no others."""
    datatype = draw(st.sampled_from(sorted(DATATYPES)))
    shape = draw(_SHAPES)
    if datatype == "BYTES":
        return draw(hnp.arrays(object, shape, elements=_utf8, fill=st.nothing()))
    elements = hnp.from_dtype(DATATYPES[datatype], allow_nan=False, allow_infinity=False)
    return draw(hnp.arrays(DATATYPES[datatype], shape, elements=elements))


def _datatype(tensor: Tensor) -> str:
    return next(name for name, dtype in DATATYPES.items() if dtype == tensor.dtype)


def _client_input(name, tensor, *, binary):
    client_input = triton.InferInput(name, list(tensor.shape), _datatype(tensor))
    return client_input.set_data_from_numpy(tensor, binary_data=binary)


def _same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tolist() == right.tolist()


def _body(**changes):
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2.5]}
    return json.dumps({"inputs": [{**tensor, **changes}]}).encode()


def _refusal(body, header_length=None, **options):
    with pytest.raises(PeerError) as refusal:
        parse_infer_request(body, header_length, **options)
    return refusal.value


# --- conformance with tritonclient


@given(st.lists(st.tuples(_tensors(), st.booleans()), min_size=1, max_size=3))
def test_what_tritonclient_sends_is_what_is_read(tensors):
    """JSON and binary inputs of every datatype, mixed in one request, arrive bit for bit."""
    inputs = [_client_input(f"in{n}", tensor, binary=binary) for n, (tensor, binary) in enumerate(tensors)]
    body, header_length = triton.InferenceServerClient.generate_request_body(inputs, request_id="7")
    request = parse_infer_request(body, header_length)
    assert request.id == "7"
    assert list(request.inputs) == [f"in{n}" for n in range(len(tensors))]
    assert all(_same(request.inputs[f"in{n}"], tensor) for n, (tensor, _) in enumerate(tensors))
    assert all(tensor.flags.aligned and tensor.flags.c_contiguous for tensor in request.inputs.values())


@given(st.lists(st.tuples(_tensors(), st.booleans()), min_size=1, max_size=3), st.booleans())
def test_tritonclient_reads_what_is_answered(tensors, ask):
    """Outputs of every datatype, each in the form that was asked for, are what the client sees."""
    outputs = {f"out{n}": tensor for n, (tensor, _) in enumerate(tensors)}
    wanted = tuple(RequestedOutput(f"out{n}", {"binary_data": binary}) for n, (_, binary) in enumerate(tensors))
    parameters = {} if ask else {"binary_data_output": True}
    request = InferRequest("7", {}, parameters, wanted if ask else ())
    body, header_length = encode_infer_response(InferResponse("m", "1", "7", outputs, {"note": 1}), request)
    result = triton.InferenceServerClient.parse_response_body(body, header_length=header_length)
    for name, tensor in outputs.items():
        read = result.as_numpy(name)
        # In JSON, tritonclient gives texts as str; in binary form as bytes.
        got = [item.encode() if isinstance(item, str) else item for item in read.reshape(-1).tolist()]
        assert got == tensor.reshape(-1).tolist()
        assert read.shape == tensor.shape
        assert result.get_output(name)["datatype"] == _datatype(tensor)
    document = result.get_response()
    assert (document["model_name"], document["model_version"], document["id"]) == ("m", "1", "7")
    assert document["parameters"] == {"note": 1}


def test_tritonclient_parameters_and_outputs_are_read():
    """Requested outputs, their form, and the client's own parameters arrive."""
    body, header_length = triton.InferenceServerClient.generate_request_body(
        [_client_input("x", np.zeros((1, 4), np.float32), binary=True)],
        outputs=[triton.InferRequestedOutput("a"), triton.InferRequestedOutput("b", binary_data=False)],
        priority=2,
        timeout=500,
        parameters={"tenant": "line-7"},
    )
    request = parse_infer_request(body, header_length)
    assert [(output.name, output.parameters["binary_data"]) for output in request.outputs] == [
        ("a", True),
        ("b", False),
    ]
    assert request.parameters == {"priority": 2, "timeout": 500, "tenant": "line-7"}


def test_tritonclient_shared_memory_and_classification_are_refused():
    """What would name host memory, or change an output's meaning, gets 400 and its reason."""
    shared = triton.InferInput("x", [4], "FP32").set_shared_memory("region", 16)
    body, length = triton.InferenceServerClient.generate_request_body([shared])
    assert _refusal(body, length).reason == "shared_memory"
    plain = _client_input("x", np.zeros(4, np.float32), binary=True)
    output = triton.InferRequestedOutput("y")
    output.set_shared_memory("region", 16)
    assert (
        _refusal(*triton.InferenceServerClient.generate_request_body([plain], outputs=[output])).reason
        == "shared_memory"
    )
    counted = triton.InferRequestedOutput("y", class_count=3)
    refusal = _refusal(*triton.InferenceServerClient.generate_request_body([plain], outputs=[counted]))
    assert str(refusal).startswith("outputs[0].parameters.classification:")


def test_bf16_is_refused_by_name():
    """A datatype that is not served is named as the reason."""
    assert _refusal(_body(datatype="BF16")).reason == "datatype"


# --- requests


def test_flat_and_nested_data_are_the_same_tensor():
    """Both forms of the protocol give one array."""
    flat = parse_infer_request(_body(shape=[2, 1, 2], data=[1, 2, 3, 4])).inputs["x"]
    nested = parse_infer_request(_body(shape=[2, 1, 2], data=[[[1, 2]], [[3, 4]]])).inputs["x"]
    assert _same(flat, nested)
    assert parse_infer_request(_body(shape=[], data=[5])).inputs["x"].shape == ()
    assert parse_infer_request(_body(shape=[2, 0], data=[[], []])).inputs["x"].shape == (2, 0)


@pytest.mark.parametrize(
    ("datatype", "low", "high"),
    [(name, np.iinfo(DATATYPES[name]).min, np.iinfo(DATATYPES[name]).max) for name in _NUMERIC if "INT" in name],
)
def test_integers_that_do_not_fit_are_refused_and_never_wrapped(datatype, low, high):
    """The extremes pass; one past them does not."""
    tensor = parse_infer_request(_body(datatype=datatype, data=[low, high])).inputs["x"]
    assert tensor.tolist() == [low, high]
    for value in (low - 1, high + 1, 10**30, -(10**30)):
        assert str(_refusal(_body(datatype=datatype, data=[0, value]))).startswith("inputs[0].data: has an integer")


_X = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ([], "body"),
        ("x", "body"),
        ({"inputs": [_X], "extra": 1}, "body"),
        ({}, "inputs"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [_X] * 65}, "inputs"),
        ({"inputs": [1]}, "inputs[0]"),
        ({"inputs": [_X, {**_X, "name": "y", "extra": 1}]}, "inputs[1]"),
        ({"inputs": [_X, _X]}, "inputs[1].name"),
        ({"inputs": [{**_X, "name": ""}]}, "inputs[0].name"),
        ({"inputs": [{**_X, "name": 5}]}, "inputs[0].name"),
        ({"inputs": [{**_X, "name": "n" * 257}]}, "inputs[0].name"),
        ({"inputs": [{**_X, "datatype": None}]}, "inputs[0].datatype"),
        ({"inputs": [{**_X, "datatype": "fp32"}]}, "inputs[0]"),
        ({"inputs": [{**_X, "shape": 1}]}, "inputs[0].shape"),
        ({"inputs": [{**_X, "shape": [1.0]}]}, "inputs[0].shape"),
        ({"inputs": [{**_X, "shape": [True]}]}, "inputs[0].shape"),
        ({"inputs": [{**_X, "shape": ["1"]}]}, "inputs[0].shape"),
        ({"inputs": [{**_X, "shape": [1] * 9}]}, "inputs[0].shape"),
        ({"inputs": [{**_X, "shape": [-1]}]}, "inputs[0]"),
        ({"inputs": [{**_X, "shape": [2**62, 4]}]}, "inputs[0]"),
        ({"inputs": [{**_X, "shape": [2**200]}]}, "inputs[0]"),
        ({"inputs": [{**_X, "shape": [0, 2**40], "data": []}]}, "inputs[0]"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}]}, "inputs[0]"),
        ({"inputs": [{**_X, "parameters": {"binary_data_size": 4}}]}, "inputs[0]"),
        ({"inputs": [{**_X, "parameters": []}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"a": None}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"a": {}}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"a": 2**63}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"a": "b" * 1025}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"a" * 257: 1}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {str(n): 1 for n in range(33)}}]}, "inputs[0].parameters"),
        ({"inputs": [{**_X, "parameters": {"shared_memory_region": "r"}}]}, "inputs[0].parameters"),
        ({"inputs": [_X], "parameters": {"binary_data_output": 1}}, "parameters.binary_data_output"),
        ({"inputs": [_X], "parameters": None}, "parameters"),
        ({"inputs": [_X], "id": 7}, "id"),
        ({"inputs": [_X], "id": "i" * 129}, "id"),
        ({"inputs": [_X], "id": "a\nb"}, "id"),
        ({"inputs": [_X], "outputs": None}, "outputs"),
        ({"inputs": [_X], "outputs": [{}]}, "outputs[0].name"),
        ({"inputs": [_X], "outputs": [{"name": "y"}, {"name": "y"}]}, "outputs[1].name"),
        ({"inputs": [_X], "outputs": [{"name": "y", "data": []}]}, "outputs[0]"),
        (
            {"inputs": [_X], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
            "outputs[0].parameters.bin",
        ),
        ({"inputs": [{**_X, "data": 1}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": {}}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": []}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [1, 2]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": ["1"]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [None]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [True]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [1e39]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [-1e39]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [10**400]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "FP16", "data": [65520]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "INT8", "data": [1.0]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "INT8", "data": [True]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "BOOL", "data": [1]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "BOOL", "data": ["true"]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "BYTES", "data": [1]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "datatype": "BYTES", "data": "a"}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "data": [[1]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [], "data": [[1]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [1, 1], "data": [[[1]]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [2, 2], "data": [[1, 2], 3]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [2, 2], "data": [[1, 2], [3]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [2, 2], "data": [[1, 2, 3, 4]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [2, 2], "data": [[1], [2, 3, 4]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [1, 2, 1], "data": [[1, 2]]}]}, "inputs[0].data"),
        ({"inputs": [{**_X, "shape": [1, 1], "data": [[{}]]}]}, "inputs[0].data"),
    ],
)
def test_a_bad_request_is_refused_with_its_place(document, where):
    """400, and the message begins with where the fault is."""
    refusal = _refusal(json.dumps(document).encode())
    assert refusal.status == 400
    assert str(refusal).startswith(where)


@pytest.mark.parametrize("text", [b'{"inputs":[],"inputs":[]}', b'{"inputs":[{"secret-key":1,"secret-key":2}]}'])
def test_duplicate_keys_are_refused_without_being_quoted(text):
    """The place is told, the key is not."""
    message = str(_refusal(text))
    assert message.startswith("body: has a duplicate key at line 1 column")
    assert "secret" not in message


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"nul",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b'{"id":"\\ud800"}',
        b'{"id":"\x01"}',
        b'{"a":1,}',
        b"{'a':1}",
    ],
)
def test_what_is_no_json_is_refused(text):
    """Malformed, truncated and deeply nested text ends in a 400 of the parser."""
    assert _refusal(text).reason in {"json", "malformed"}


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
def test_non_finite_numbers_pass_only_where_the_model_allows_them(number):
    """The default refuses them, whatever their spelling."""
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[' + number + b"]}]}"
    assert _refusal(body).status == 400
    assert not np.isfinite(parse_infer_request(body, allow_nonfinite=True).inputs["x"]).any()


def test_a_model_that_allows_infinities_does_not_get_one_by_rounding():
    """A finite number that FP32 cannot hold stays refused; its neighbours that are infinite do not hide it."""
    body = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[Infinity,1e39]}]}'
    assert "not finite as float32" in str(_refusal(body, allow_nonfinite=True))


def test_large_finite_values_are_not_taken_for_infinite():
    """Values whose square overflows are finite all the same."""
    value = float(np.finfo(np.float32).max)
    assert parse_infer_request(_body(data=[value, -value])).inputs["x"].tolist() == [value, -value]


def test_sizes_have_their_own_status():
    """413 for a body or a JSON part past its limit; binary parts do not count as JSON."""
    limits = WireLimits(body_bytes=400, json_bytes=200)
    assert _refusal(b" " * 401, limits=limits).status == 413
    assert _refusal(b" " * 201, limits=limits).status == 413
    tensor = np.zeros(50, np.float32)
    body, length = triton.InferenceServerClient.generate_request_body([_client_input("x", tensor, binary=True)])
    assert len(body) > 200
    assert parse_infer_request(body, length, limits=limits).inputs["x"].shape == (50,)


# --- the binary extension


def _binary_request(*sizes, tail=b""):
    inputs = [
        {"name": f"x{n}", "shape": [2], "datatype": "UINT8", "parameters": {"binary_data_size": size}}
        for n, size in enumerate(sizes)
    ]
    header = json.dumps({"inputs": inputs}).encode()
    return header + tail, len(header)


def test_binary_parts_follow_in_the_order_of_the_inputs():
    """Each input takes its bytes from where the one before it ended."""
    request = parse_infer_request(*_binary_request(2, 2, tail=b"\1\2\3\4"))
    assert [tensor.tolist() for tensor in request.inputs.values()] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("sizes", "tail"),
    [
        ((2, 2), b"\1\2\3"),
        ((2,), b"\1\2\3"),
        ((2,), b""),
        ((1,), b"\1"),
        ((3,), b"\1\2\3"),
        ((-1,), b"\1\2"),
        ((2**70,), b""),
        ((True,), b"\1"),
        ((2.0,), b"\1\2"),
        (("2",), b"\1\2"),
    ],
)
def test_binary_sizes_must_be_exact(sizes, tail):
    """Too short, too long, left over or of another type: 400."""
    assert _refusal(*_binary_request(*sizes, tail=tail)).status == 400


def test_true_is_no_binary_size():
    """A boolean is not taken for the number one, though Python counts it as one."""
    x = {"name": "x", "shape": [1], "datatype": "UINT8", "parameters": {"binary_data_size": True}}
    header = json.dumps({"inputs": [x]}).encode()
    assert "binary_data_size" in str(_refusal(header + b"\1", len(header)))


@pytest.mark.parametrize("length", [0, -1, 10_000])
def test_a_header_length_outside_the_body_is_refused(length):
    """It must leave some JSON and end inside the body."""
    assert HEADER_LENGTH in str(_refusal(_body(), length))


def test_binary_data_without_a_header_length_is_refused():
    """Without the header the whole body is JSON."""
    body, _ = _binary_request(2)
    assert _refusal(body).status == 400


@pytest.mark.parametrize("padding", range(8))
def test_an_odd_length_of_the_json_part_does_not_misalign_a_tensor(padding):
    """Wherever the client's JSON ends, the array begins at an address that its type may have."""
    body, length = triton.InferenceServerClient.generate_request_body(
        [_client_input("x", np.arange(5, dtype=np.float64), binary=True)]
    )
    padded = body[:length] + b" " * padding + body[length:]
    tensor = parse_infer_request(padded, length + padding).inputs["x"]
    assert tensor.flags.aligned
    assert not tensor.flags.writeable
    assert tensor.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", ["", "x", "-1", "+1", " 1", "1 ", "1.0", "0x1", "1_0", "\u0661", "9" * 11])
def test_a_header_length_is_plain_decimal(value):
    """Only ASCII digits are a number."""
    with pytest.raises(PeerError):
        parse_header_length(value)


def test_headers_that_clients_send_are_accepted():
    """No content type at all, the two of the protocol with parameters, and a decimal length."""
    assert parse_header_length(None) is None
    assert parse_header_length("129") == 129
    for value in (None, "application/json", "Application/JSON; charset=utf-8", "application/octet-stream"):
        check_content_type(value)
    for value in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data"):
        with pytest.raises(PeerError) as refusal:
            check_content_type(value)
        assert refusal.value.status == 415


# --- answers


@pytest.mark.parametrize("tensor", [np.array([np.nan], np.float32), np.array([np.inf]), np.array([b"\xff"], object)])
def test_what_json_cannot_carry_is_refused_and_goes_in_binary_form(tensor):
    """No NaN becomes null; the client is told to ask for the binary form, which carries it."""
    response = InferResponse("m", "1", "", {"y": tensor})
    with pytest.raises(PeerError) as refusal:
        encode_infer_response(response, InferRequest("", {}))
    assert refusal.value.reason == "not_json"
    body, length = encode_infer_response(response, InferRequest("", {}, {"binary_data_output": True}))
    read = triton.InferenceServerClient.parse_response_body(body, header_length=length).as_numpy("y")
    assert read.tobytes() == tensor.tobytes() if tensor.dtype != object else read.tolist() == tensor.tolist()


def test_an_output_of_another_memory_order_is_sent_in_row_major_order():
    """Transposed arrays are written as the protocol demands, in both forms."""
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for parameters in ({}, {"binary_data_output": True}):
        body, length = encode_infer_response(
            InferResponse("m", "1", "", {"y": tensor}), InferRequest("", {}, parameters)
        )
        read = triton.InferenceServerClient.parse_response_body(body, header_length=length).as_numpy("y")
        assert _same(read, tensor)


def test_metadata_is_the_protocols():
    """The documents have the members that the protocol names."""
    assert json.loads(server_metadata("edgewarden", "1")) == {
        "name": "edgewarden",
        "version": "1",
        "extensions": ["binary_tensor_data"],
    }
    spec = TensorSpec("x", "FP32", (-1, 4))
    assert json.loads(model_metadata("m", ["1"], [spec], [])) == {
        "name": "m",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [],
    }


# --- generated requests

_words = st.sampled_from(
    ["inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size", "binary_data"]
)
_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["FP32", "BYTES", "x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words | st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)


def _only_refused_or_read(body, length):
    outcome = value_or_refusal(lambda: parse_infer_request(body, length))
    if isinstance(outcome, PeerError):
        assert outcome.status in {400, 413}
    else:
        assert outcome.inputs


@given(st.binary(max_size=200), st.none() | st.integers(-2, 210))
def test_arbitrary_bytes_are_refused(body, length):
    """Noise never raises anything but PeerError."""
    _only_refused_or_read(body, length)


@given(_json_values)
def test_arbitrary_json_is_refused_or_read(value):
    """Any JSON text, also with NaN, never raises anything but PeerError."""
    _only_refused_or_read(json.dumps(value).encode(), None)


_almost_tensor = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "y"]) | _json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | _json_values,
        "datatype": st.sampled_from([*DATATYPES, "BF16"]) | _json_values,
    },
    optional={
        "data": st.lists(st.integers(-300, 300) | st.floats() | st.booleans() | st.text(max_size=2), max_size=8)
        | _json_values,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 40)}) | _json_values,
    },
)


@pytest.mark.fuzz
@given(st.lists(_almost_tensor, max_size=3), st.binary(max_size=40), st.integers(-3, 3) | st.none())
@example([{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [[1, 2], [3, "4"]]}], b"", None)
def test_almost_valid_requests_are_refused_or_read(inputs, tail, shift):
    """Requests that are right in most places, with a binary tail, never raise anything but PeerError."""
    header = json.dumps({"inputs": inputs}).encode()
    _only_refused_or_read(header + tail, None if shift is None else len(header) + shift)


@pytest.mark.fuzz
@given(st.data())
def test_damaged_requests_are_refused_or_read(data):
    """Any bytes of a real client's request may change."""
    tensors = [np.arange(6, dtype=np.int16).reshape(2, 3), np.array([b"ab", b""], object)]
    binary = data.draw(st.booleans())
    inputs = [_client_input(f"x{n}", tensor, binary=binary) for n, tensor in enumerate(tensors)]
    body, length = triton.InferenceServerClient.generate_request_body(inputs)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    _only_refused_or_read(bytes(damaged), length)
