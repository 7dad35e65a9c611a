"""The Open Inference Protocol v2 over REST, as bytes and values; no network, no model.

Sources: the "Inference REST" document of the Open Inference Protocol v2, and its "binary tensor data" extension.

A request is read in this order, and the first rule that it breaks is named with the place (``inputs[0].data``), never with
what the client sent there:

1. Sizes: the body, then its JSON part, within :class:`WireLimits`; ``Inference-Header-Content-Length`` divides the two.
2. JSON by one parser, which refuses duplicate keys; NaN, Infinity and numbers that overflow are refused unless the model
   allows them. (Values inside binary tensors are no syntax: the model's manifest and the sanitizers judge them.)
3. Members: known ones only, each of its type, each list and each text within its limit, names unique.
4. A tensor has either ``data`` (flat, or nested exactly as its shape) or ``binary_data_size``. The count of elements is
   the shape's product before an array is made. Integers must fit, and only integers are integers; a BOOL is true or
   false; a BYTES element in JSON is a string, standing for its UTF-8.
5. Binary parts follow the JSON in the order of the inputs and fill the body exactly.
6. Shared memory is refused: it would let a client name memory of this host. So is the classification extension, which
   would change what an output means.

The arrays of a request are its own: nothing else writes to them; those from binary parts are read-only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiter
import numpy as np
import orjson

from agent.errors import PeerError
from agent.gateway.tensor_json import check_finite, tensor_from_json, tensor_to_json
from agent.inference.tensors import (
    InferRequest,
    InferResponse,
    RequestedOutput,
    Tensor,
    datatype_of,
    tensor_from_binary,
    tensor_to_binary,
)
from agent.records import TensorSpec

__all__ = [
    "DEFAULT_LIMITS",
    "EXTENSIONS",
    "HEADER_LENGTH",
    "WireLimits",
    "check_content_type",
    "encode_infer_response",
    "model_metadata",
    "parse_header_length",
    "parse_infer_request",
    "server_metadata",
]

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data",)


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What one request may hold. A JSON byte costs up to some twenty bytes of memory while it is parsed."""

    body_bytes: int = 64 << 20
    json_bytes: int = 8 << 20
    tensors: int = 64
    rank: int = 8
    name_chars: int = 256
    id_chars: int = 128
    parameters: int = 32
    parameter_chars: int = 1024


DEFAULT_LIMITS = WireLimits()

_CONTENT_TYPES = frozenset(
    {"application/json", "application/octet-stream", "application/vnd.sagemaker-triton.binary+json"}
)
_DIGITS = re.compile(r"[0-9]{1,10}", re.ASCII)
_POSITION = re.compile(r"at line \d+ column \d+\Z", re.ASCII)
_REQUEST_MEMBERS = frozenset({"id", "parameters", "inputs", "outputs"})
_INPUT_MEMBERS = frozenset({"name", "shape", "datatype", "parameters", "data"})
_OUTPUT_MEMBERS = frozenset({"name", "parameters"})
_INTEGERS = {int}
_NUMBERS = (bool, int, float)
_INT64 = 1 << 63


# --- requests


def check_content_type(value: str | None) -> None:
    """Accept what clients of the protocol send; some send none at all.

    Raises:
        PeerError: 415.
    """
    if (
        value is not None
        and value not in _CONTENT_TYPES
        and value.partition(";")[0].strip().lower() not in _CONTENT_TYPES
    ):
        raise PeerError(415, "content_type", "Content-Type must be application/json or application/octet-stream")


def parse_header_length(value: str | None) -> int | None:
    """Read the ``Inference-Header-Content-Length`` header, in bytes; None when the body is JSON alone.

    Raises:
        PeerError: 400.
    """
    if value is None:
        return None
    if _DIGITS.fullmatch(value) is None:
        raise PeerError(400, "header_length", f"{HEADER_LENGTH} must be a decimal number")
    return int(value)


def parse_infer_request(
    body: bytes,
    header_length: int | None = None,
    *,
    limits: WireLimits = DEFAULT_LIMITS,
    allow_nonfinite: bool = False,
) -> InferRequest:
    """Decode the body of ``POST …/infer``.

    Args:
        body: the whole body, uncompressed.
        header_length: size of its JSON part in bytes (:func:`parse_header_length`).
        limits: what it may hold.
        allow_nonfinite: whether the model takes NaN and infinities.

    Raises:
        PeerError: 413 for a size of the module's first rule, else 400.
    """
    document, binary = _split(body, header_length, limits)
    request = _parse_json(document, allow_nonfinite=allow_nonfinite)
    if not isinstance(request, dict):
        raise _bad("body", "must be a JSON object")
    if not _REQUEST_MEMBERS.issuperset(request):
        raise _bad("body", "may have the members id, parameters, inputs and outputs only")
    parameters: dict[str, Any] = {}
    if "parameters" in request:
        parameters = _parameters(request, "parameters", limits)
        _check_bool(parameters, "binary_data_output", "parameters")
    inputs = _read_inputs(_members(request, "inputs", limits), binary, limits, allow_nonfinite=allow_nonfinite)
    if not inputs:
        raise _bad("inputs", "must not be empty")
    outputs = _requested_outputs(_members(request, "outputs", limits), limits) if "outputs" in request else ()
    return InferRequest(_request_id(request, limits) if "id" in request else "", inputs, parameters, outputs)


def _split(body: bytes, header_length: int | None, limits: WireLimits) -> tuple[bytes, memoryview]:
    if len(body) > limits.body_bytes:
        raise PeerError(413, "body_too_large", f"body: more than {limits.body_bytes} bytes")
    size = len(body) if header_length is None else header_length
    if size > limits.json_bytes:
        raise PeerError(
            413, "json_too_large", f"body: more than {limits.json_bytes} bytes of JSON; send tensors as binary data"
        )
    if not 0 < size <= len(body):
        raise _bad(HEADER_LENGTH, "is not within the body")
    return body if size == len(body) else body[:size], memoryview(body)[size:]


def _parse_json(document: bytes, *, allow_nonfinite: bool) -> object:
    try:
        # Texts are not cached across requests: the cache would hold one client's data while another is served.
        return jiter.from_json(document, catch_duplicate_keys=True, allow_inf_nan=allow_nonfinite, cache_mode="keys")
    except ValueError as error:
        # The parser's words may quote a key: only the kind of fault and its place are passed on.
        words = str(error)
        what = "has a duplicate key" if words.startswith("Detected duplicate key") else "is not valid JSON"
        place = _POSITION.search(words)
        raise PeerError(400, "json", f"body: {what} {place[0] if place else ''}".rstrip()) from error


def _members(request: dict[str, Any], name: str, limits: WireLimits) -> list[Any]:
    members = request.get(name)
    if not isinstance(members, list):
        raise _bad(name, "must be a list")
    if len(members) > limits.tensors:
        raise _bad(name, f"has more than {limits.tensors} elements")
    return members


def _request_id(request: dict[str, Any], limits: WireLimits) -> str:
    value = request["id"]
    if not isinstance(value, str) or len(value) > limits.id_chars or not value.isprintable():
        raise _bad("id", f"must be printable text of at most {limits.id_chars} characters")
    return value


def _name(member: dict[str, Any], where: str, known: Iterable[str], limits: WireLimits) -> str:
    value = member.get("name")
    if not isinstance(value, str) or not 0 < len(value) <= limits.name_chars:
        raise _bad(f"{where}.name", f"must be text of 1 to {limits.name_chars} characters")
    if value in known:
        raise _bad(f"{where}.name", "is used twice")
    return value


def _parameters(member: dict[str, Any], where: str, limits: WireLimits) -> dict[str, Any]:
    """Return an object's ``parameters``: scalars by name, as the protocol has them."""
    value = member.get("parameters", {})
    if not isinstance(value, dict):
        raise _bad(where, "must be an object")
    if len(value) > limits.parameters:
        raise _bad(where, f"has more than {limits.parameters} members")
    for name, scalar in value.items():
        if len(name) > limits.name_chars:
            raise _bad(where, f"has a name of more than {limits.name_chars} characters")
        if name.startswith("shared_memory"):
            raise PeerError(400, "shared_memory", f"{where}: shared memory is not offered; send the data itself")
        _check_scalar(scalar, where, limits)
    return value


def _check_scalar(scalar: object, where: str, limits: WireLimits) -> None:
    if isinstance(scalar, str):
        if len(scalar) > limits.parameter_chars:
            raise _bad(where, f"has a text of more than {limits.parameter_chars} characters")
    elif not isinstance(scalar, _NUMBERS):
        raise _bad(where, "may hold texts, numbers and booleans only")
    elif not -_INT64 <= scalar < _INT64:
        raise _bad(where, "has a number outside the range of 64 bits")


def _check_bool(parameters: Mapping[str, Any], name: str, where: str) -> None:
    if not isinstance(parameters.get(name, False), bool):
        raise _bad(f"{where}.{name}", "must be a boolean")


def _requested_outputs(members: list[Any], limits: WireLimits) -> tuple[RequestedOutput, ...]:
    outputs: dict[str, RequestedOutput] = {}
    for index, member in enumerate(members):
        where = f"outputs[{index}]"
        if not isinstance(member, dict) or not _OUTPUT_MEMBERS.issuperset(member):
            raise _bad(where, "must be an object of name and parameters")
        name = _name(member, where, outputs, limits)
        parameters = _parameters(member, f"{where}.parameters", limits)
        _check_bool(parameters, "binary_data", f"{where}.parameters")
        if "classification" in parameters:
            raise _bad(f"{where}.parameters.classification", "is not offered; the policy's output profile decides")
        outputs[name] = RequestedOutput(name, parameters)
    return tuple(outputs.values())


def _read_inputs(
    members: list[Any], binary: memoryview, limits: WireLimits, *, allow_nonfinite: bool
) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    at = 0  # in the binary parts
    for index, member in enumerate(members):
        where = f"inputs[{index}]"
        if not isinstance(member, dict) or not _INPUT_MEMBERS.issuperset(member):
            raise _bad(where, "must be an object of name, shape, datatype, parameters and data")
        name = _name(member, where, inputs, limits)
        datatype = member.get("datatype")
        if not isinstance(datatype, str):
            raise _bad(f"{where}.datatype", "must be a text")
        shape = member.get("shape")
        if not isinstance(shape, list) or len(shape) > limits.rank or not _INTEGERS.issuperset(map(type, shape)):
            raise _bad(f"{where}.shape", f"must be a list of at most {limits.rank} integers")
        size = _binary_size(member, where, limits)
        if size is None:
            inputs[name] = tensor_from_json(member["data"], datatype, shape, where, allow_nonfinite=allow_nonfinite)
        elif size > len(binary) - at:
            raise _bad(f"{where}.parameters.binary_data_size", "is more than the rest of the body")
        else:
            inputs[name] = _aligned(tensor_from_binary(datatype, shape, binary[at : at + size], where))
            at += size
    if at != len(binary):
        raise _bad("body", f"{len(binary) - at} bytes follow the last binary tensor")
    return inputs


def _binary_size(member: dict[str, Any], where: str, limits: WireLimits) -> int | None:
    """Return an input's ``binary_data_size``, or None when it has ``data``: it has one of them."""
    parameters = _parameters(member, f"{where}.parameters", limits) if "parameters" in member else {}
    if "binary_data_size" not in parameters:
        if "data" not in member:
            raise _bad(where, "has neither data nor binary_data_size")
        return None
    if "data" in member:
        raise _bad(where, "has both data and binary_data_size")
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise _bad(f"{where}.parameters.binary_data_size", "must be an integer of 0 or more")
    return size


def _aligned(tensor: Tensor) -> Tensor:
    """Copy a tensor that begins at an odd address: how long the JSON before it is, is the client's choice."""
    if not tensor.flags.aligned:
        tensor = np.require(tensor, requirements="A")
        tensor.flags.writeable = False
    return tensor


def _bad(where: str, what: str) -> PeerError:
    return PeerError(400, "malformed", f"{where}: {what}")


# --- answers


def encode_infer_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """Encode a model's answer in the form that the request asks for.

    An output is binary where its own ``binary_data`` or else the request's ``binary_data_output`` says so.

    Returns:
        The body, and the size of its JSON part in bytes (``Inference-Header-Content-Length``) when binary parts follow.

    Raises:
        PeerError: 400, for values that JSON cannot carry: NaN, infinities, octets that are not UTF-8.
    """
    default = request.parameters.get("binary_data_output", False)
    wanted = {output.name: output.parameters.get("binary_data", default) for output in request.outputs}
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, tensor in response.outputs.items():
        output: dict[str, Any] = {"name": name, "datatype": datatype_of(tensor), "shape": tensor.shape}
        if wanted.get(name, default):
            data = tensor_to_binary(tensor)
            binary.append(data)
            output["parameters"] = {"binary_data_size": len(data)}
        else:
            output["data"] = tensor_to_json(tensor, name)
        outputs.append(output)
    document: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        document["id"] = response.id
    if response.parameters:
        document["parameters"] = dict(response.parameters)
    document["outputs"] = outputs
    header = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in header:  # a text, or a number that JSON has no word for
        for output in outputs:
            if "data" in output:
                check_finite(response.outputs[output["name"]], output["name"])
    return (b"".join([header, *binary]), len(header)) if binary else (header, None)


def server_metadata(name: str, version: str, extensions: Sequence[str] = EXTENSIONS) -> bytes:
    """Encode the answer to ``GET /v2``."""
    return orjson.dumps({"name": name, "version": version, "extensions": list(extensions)})


def model_metadata(
    name: str,
    versions: Sequence[str],
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    *,
    platform: str = "onnxruntime_onnx",
) -> bytes:
    """Encode the answer to ``GET /v2/models/{name}``."""
    described = [
        [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
        for specs in (inputs, outputs)
    ]
    document = {"name": name, "versions": list(versions), "platform": platform}
    return orjson.dumps({**document, "inputs": described[0], "outputs": described[1]})
