"""The whole inference path of a running node: real TPM commands, real sandboxes, strict audit, the protocol's stock client."""

import contextlib
import hashlib
import io
import json
import re
import socket
import ssl
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from agent import clock
from agent.flows.refusals import RECORDS_PER_SECOND
from agent.inference.tensors import oip_binary
from tests.support.identity import jwks, sign_token
from tests.support.models import magika_features, page
from tests.support.node import (
    WAIT_S,
    bearer,
    binary_body,
    build_policy,
    call,
    connection,
    infer,
    records,
    start_node,
    tls_context,
)
from tools.demo_node import ROOT
from tools.example_models import ASSETS

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("node-inference")]

TINY = [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]
TINY_PATH = "/v2/models/tiny/infer"
STAGES = ("identity", "read", "admit", "decode", "policy", "sanitize", "infer", "egress", "audit")


def _last(node, **fields):
    """The last record that is not the sum of what an earlier test was refused."""
    return [record for record in records(node, **fields) if record.get("detail", {}).get("reason") != "repeated"][-1]


def _refused(node, status, reason, reply, **fields):
    """A refusal has its status, the protocol's error body and its record."""
    time.sleep(1 / RECORDS_PER_SECOND)  # else the refusals of all tests together would be counted, not recorded
    assert reply.status == status, reply
    assert reply.error
    record = _last(node)
    assert (record["kind"], record["detail"]["reason"]) == ("refusal", reason)
    assert {name: record.get(name) for name in fields} == fields
    return reply


@contextlib.contextmanager
def _raw(node, context=None):
    """A TLS connection for bytes that no HTTP library would send."""
    with (
        socket.create_connection(("127.0.0.1", node.port), WAIT_S) as plain,
        (context or tls_context(node)).wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        yield tls


def _rest(tls):
    answer = b""
    while part := tls.recv(65536):
        answer += part
    return answer


# --- the stock client


@pytest.fixture(scope="module")
def triton(running_node, tmp_path_factory):
    """What the protocol's stock client got, in a process of its own."""
    picture = tmp_path_factory.mktemp("picture") / "page.jpg"
    Image.fromarray(page(1)).save(picture, quality=92)
    command = [sys.executable, "-m", "tests.support.triton_session"]
    done = subprocess.run(
        [*command, str(running_node.port), str(running_node.root / "pki"), str(picture)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_stock_client_reads_health_and_metadata(triton):
    """Liveness, readiness and metadata of server and model come as the protocol says, dynamic shapes as -1."""
    facts = {name: triton[name] for name in ("live", "ready", "model_ready", "version_ready", "unknown_ready")}
    assert facts == {**dict.fromkeys(facts, True), "unknown_ready": False}
    assert triton["server"]["name"] == "edgewarden"
    assert triton["server"]["extensions"] == ["binary_tensor_data"]
    assert triton["model"]["versions"] == ["1"]
    assert triton["model"]["inputs"][0] == {"name": "a", "datatype": "FP32", "shape": [-1, -1]}


@pytest.mark.parametrize("form", ["json", "binary"])
def test_stock_client_infers(triton, form):
    """Several inputs and outputs with dynamic shapes and text, in the order that was asked for, exact to the last integer."""
    assert triton[f"mixed_{form}"] == {
        "id": f"id-{form == 'binary'}",
        "order": ["echo", "doubled", "negated"],
        "doubled": [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]],
        "negated": [-(2**53) - 1, 7],
        "echo": ["café", ""],
    }
    assert np.shape(triton[f"tiny_{form}"]) == (3, 10)
    assert triton["tiny_json"] == triton["tiny_binary"]


def test_stock_client_sends_a_picture(triton):
    """A JPEG in one BYTES element is decoded, sanitized, scaled and classified."""
    assert np.argmax(triton["orientation"]) == 3  # turned by 90 degrees counter-clockwise: 270 degrees clockwise


def test_stock_client_can_not_administer(triton, running_node):
    """Whatever would change the server is refused as the protocol's error, and recorded with who asked."""
    refused = dict(triton["refused"])
    assert refused.pop("compressed")["status"] == "415"
    assert refused.pop("unknown")["status"] == "404"
    assert {name for name, error in refused.items() if error is None or error["status"] != "403"} == set()
    seen = [record["action"] for record in records(running_node, kind="refusal", principal="bob")]
    for call_ in (
        "POST /v2/repository/index",
        "POST /v2/repository/models/tiny/load",
        "POST /v2/systemsharedmemory/region/s/register",
    ):
        assert call_ in seen


# --- pictures and bytes


def _encoded(pixels, form):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"quality": 92} if form == "JPEG" else {}))
    return buffer.getvalue()


def _as_tensor(pixels):
    """The model's own tensor of a picture, as its publisher's code makes it (BGR, shorter side 256, centre 224)."""
    picture = Image.fromarray(pixels)
    scale = 256 / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    values = np.asarray(picture.crop((left, top, left + 224, top + 224)))[:, :, ::-1].astype(np.float32) / 255
    scaled = (values - np.array([0.485, 0.456, 0.406], np.float32)) / np.array([0.229, 0.224, 0.225], np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None].astype(np.float32))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "FP32"])
@pytest.mark.parametrize("turns", range(4))
def test_a_scanned_page_is_classified_at_each_rotation(running_node, form, turns):
    """The real model is right through the sanitizer, whether it gets a JPEG, a PNG or its own tensor."""
    pixels = page(turns)
    body, headers = binary_body({"x": _as_tensor(pixels) if form == "FP32" else [_encoded(pixels, form)]})
    reply = call(running_node, "POST", "/v2/models/orientation/infer", body, headers)
    assert reply.status == 200, reply
    assert np.argmax(reply.outputs()["fetch_name_0"]) == (4 - turns) % 4
    assert _last(running_node)["sanitizer"] == "image-default"
    assert "sanitize.jpeg" in reply.headers["Server-Timing"]


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ((ROOT / "agent" / "config" / "__init__.py").read_bytes(), "python"),
        ((ASSETS / "skimage" / "data" / "page.png").read_bytes(), "png"),
        (json.dumps({"a": list(range(300))}).encode(), "json"),
    ],
)
def test_real_bytes_are_told_apart(running_node, content, label):
    """The file-type model names what real files are."""
    labels = (running_node.store / "magika" / "3.3.0" / "labels.txt").read_text().splitlines()
    body, headers = binary_body({"bytes": magika_features(content)}, parameters={"binary_data_output": True})
    reply = call(running_node, "POST", "/v2/models/magika/versions/3.3.0/infer", body, headers)
    assert labels[int(np.argmax(reply.outputs()["target_label"]))] == label


def test_a_batch_is_answered_row_by_row(running_node):
    """Each row of a batch gets what it gets alone, and the answer may be binary where the request was JSON."""
    rows = np.random.default_rng(5).standard_normal((8, 64)).round(3)
    tensor = {"name": "x", "datatype": "FP32", "shape": [8, 64], "data": rows.tolist()}
    batch = infer(running_node, "tiny", [tensor], outputs=[{"name": "y", "parameters": {"binary_data": True}}])
    assert batch.headers["Content-Type"] == "application/octet-stream"
    for index, row in enumerate(rows):
        alone = infer(running_node, "tiny", [{**tensor, "shape": [1, 64], "data": row.tolist()}])
        np.testing.assert_allclose(alone.outputs()["y"][0], batch.outputs()["y"][index], rtol=1e-4)


# --- what an answer carries


def test_an_answer_can_be_found_in_the_log(running_node):
    """Decision id, salt and latency split come as headers; with the salt the caller recomputes both digests of the record."""
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    body, headers = binary_body({"x": values}, id="request-7", parameters={"binary_data_output": True})
    reply = call(running_node, "POST", TINY_PATH, body, headers)
    assert reply.json["id"] == "request-7"
    (record,) = records(running_node, kind="infer", decision_id=reply.headers["EdgeWarden-Decision-Id"])
    salt = bytes.fromhex(reply.headers["EdgeWarden-Salt"])
    assert len(salt) == 32
    assert record["input_digest"] == hashlib.sha256(salt + oip_binary({"x": values})).hexdigest()
    outputs = {"y": reply.outputs()["y"]}
    assert record["output_digest"] == hashlib.sha256(salt + oip_binary(outputs)).hexdigest()
    stages = re.findall(r"([a-z.]+);dur=[0-9.]+", reply.headers["Server-Timing"])
    assert [stage for stage in stages if stage in STAGES] == list(STAGES)
    assert set(STAGES) - {"audit"} <= record["latency_us"].keys()  # the log can't know how long it took to write
    assert (record["principal"], record["principal_kind"], record["source_ip"]) == ("alice", "mtls", "127.0.0.1")
    assert (record["model"], record["version"], record["policy_revision"]) == ("tiny", "1", "r1")
    assert salt.hex() not in json.dumps(records(running_node))


def test_the_same_input_leaves_no_equal_digests(running_node):
    """Two equal requests have digests that nobody but their callers can compare."""
    for _ in range(2):
        infer(running_node, "tiny", TINY)
    first, second = records(running_node, kind="infer", model="tiny")[-2:]
    assert first["input_digest"] != second["input_digest"]
    assert first["output_digest"] != second["output_digest"]


def test_one_connection_serves_many_requests(running_node):
    """Requests, refusals of requests without a body, and metadata share a kept connection."""
    client = connection(running_node)
    seen = []
    for method, path, body in (
        ("POST", TINY_PATH, json.dumps({"inputs": TINY})),
        ("GET", "/v2/models/tiny", None),
        ("GET", "/nowhere", None),
        ("POST", TINY_PATH, "{}"),
        ("POST", TINY_PATH, json.dumps({"inputs": TINY})),
    ):
        client.request(method, path, body)
        sock = client.sock
        response = client.getresponse()
        response.read()
        seen.append((response.status, client.sock is sock))
    client.close()
    assert seen == [(200, True), (200, True), (404, True), (400, True), (200, True)]


# --- refusals


@pytest.mark.parametrize(
    ("inputs", "reason", "words"),
    [
        ([{**TINY[0], "datatype": "FP64"}], "datatype", "FP32"),
        ([{**TINY[0], "shape": [64]}], "shape", r"\[-1, 64\]"),
        ([{**TINY[0], "data": [0.5]}], None, "inputs"),
        ([{**TINY[0], "name": "z"}], "input", "missing"),
        ([], "malformed", "inputs"),
        ([{**TINY[0], "parameters": {"shared_memory_region": "s"}}], "shared_memory", "shared memory"),
    ],
)
def test_a_wrong_tensor_is_400_and_says_where(running_node, inputs, reason, words):
    """400 names what is wrong and where; the record says who sent it to which model."""
    reply = infer(running_node, "tiny", inputs)
    assert re.search(words, reply.error)
    record = _last(running_node)
    _refused(running_node, 400, reason or record["detail"]["reason"], reply, principal="alice", model="tiny")


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"{", {}, "json"),
        (b'{"inputs":[],"inputs":[]}', {}, "json"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', {}, "json"),
        (b'{"inputs":[{"name":"\\ud800","datatype":"FP32","shape":[1],"data":[1]}]}', {}, None),
        (b"[" * 5000, {}, "json"),
        (b"{}", {"Inference-Header-Content-Length": "7"}, "malformed"),
        (b"{}", {"Inference-Header-Content-Length": "-1"}, "header_length"),
        (b"", {}, "malformed"),
    ],
)
def test_a_body_that_is_no_request_is_400(running_node, body, headers, reason):
    """What can't be parsed is refused as the protocol's error, whatever it holds."""
    reply = call(running_node, "POST", TINY_PATH, body, headers)
    _refused(running_node, 400, reason or _last(running_node)["detail"]["reason"], reply, principal="alice")


def test_an_unknown_output_is_400(running_node):
    """An output that the model does not have is named."""
    reply = infer(running_node, "tiny", TINY, outputs=[{"name": "z"}])
    assert "z" in _refused(running_node, 400, "output", reply, principal="alice").error


@pytest.mark.parametrize(
    "case",
    [
        ("GET", TINY_PATH, 405, "method", "POST"),
        ("DELETE", "/v2/models/tiny", 405, "method", "GET"),
        ("POST", "/v2", 405, "method", "GET"),
        ("PUT", "/v2/health/live", 405, "method", "GET"),
        ("GET", "/", 404, "path", ""),
        ("GET", "/v2/models/tiny/versions/1/unknown", 404, "path", ""),
        ("GET", "/v2/models/" + "a" * 600, 404, "path", ""),
        ("GET", "/v2/models/tiny/config", 403, "surface", ""),
        ("POST", "/v2/models/tiny/generate", 403, "surface", ""),
        ("POST", "/v2/logging", 403, "surface", ""),
        ("GET", "/v2/models/absent", 404, "unknown_model", ""),
        ("GET", "/v2/models/tiny/versions/9", 404, "unknown_model", ""),
        ("GET", "/v2/models/%2e%2e/config", 404, "path", ""),
    ],
)
def test_another_path_or_method_is_refused_and_recorded(running_node, case):
    """404, 405 and 403 are the protocol's errors, and the record says who tried what."""
    method, path, status, reason, allowed = case
    reply = call(running_node, method, path)
    assert allowed in _refused(running_node, status, reason, reply, principal="alice").error
    if reason in {"path", "method", "surface"}:
        assert _last(running_node)["action"].startswith(f"{method} /")
        assert len(_last(running_node)["action"]) <= 200


def test_an_unknown_model_is_404_for_inference(running_node):
    """No such model: 404, recorded under the principal."""
    _refused(running_node, 404, "unknown_model", infer(running_node, "absent", TINY), principal="alice")


def test_another_content_type_or_coding_is_415(running_node):
    """A body of another type, or a compressed one, is not looked into."""
    for headers, reason in (
        ({"Content-Type": "text/html"}, "content_type"),
        ({"Content-Encoding": "gzip"}, "content_encoding"),
    ):
        reply = call(running_node, "POST", TINY_PATH, {"inputs": TINY}, headers)
        _refused(running_node, 415, reason, reply, principal="alice")


def test_a_denial_by_policy_is_403(running_node):
    """A role that may not is refused; the reasons stand in the log, not in the answer."""
    reply = infer(running_node, "tiny", TINY, who="eve")
    assert reply.error == "denied by policy"
    _refused(running_node, 403, "policy", reply, principal="eve", outcome="denied", reasons=["role_may_not_infer"])
    assert _last(running_node)["decision_id"]


def test_a_body_over_the_limit_is_413_before_it_is_sent(running_node):
    """The announced length is judged first: the client that waits for 100 Continue never sends its body."""
    with _raw(running_node) as tls:
        tls.sendall(
            f"POST {TINY_PATH} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 900000000\r\n\r\n".encode()
        )
        head = tls.recv(65536)
    assert head.startswith(b"HTTP/1.1 413 ")
    assert _last(running_node)["detail"]["reason"] == "body_too_large"


def test_a_client_that_waits_for_100_continue_is_served(running_node):
    """Expect: 100-continue gets its interim answer, then the real one."""
    body = json.dumps({"inputs": TINY}).encode()
    with _raw(running_node) as tls:
        head = f"POST {TINY_PATH} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
        tls.sendall(head.encode())
        assert tls.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        tls.sendall(body)
        assert tls.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_chunked_body_is_limited_as_it_comes(running_node):
    """A body without a length is cut off once it is over the limit."""
    with _raw(running_node) as tls:
        tls.sendall(f"POST {TINY_PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        try:
            for _ in range(9):
                tls.sendall(chunk)
        except OSError:
            pass  # the answer came before the rest was sent
        answer = tls.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert _last(running_node)["detail"]["reason"] == "body_too_large"


def test_a_batch_over_the_limit_is_413(running_node):
    """More rows than the limit allows are refused before they are asked about."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [65, 64], "data": [0.0] * (65 * 64)}
    _refused(running_node, 413, "batch_too_large", infer(running_node, "tiny", [tensor]), principal="alice")


def test_what_is_no_http_gets_no_echo(running_node):
    """Broken HTTP is answered with the protocol's error and without a word of what was sent; the log gets no line of it."""
    for sent in (
        b"GET /v2\x00 HTTP/1.1\r\n\r\n",
        b"G\xffT secret-words HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nA" + b"a" * 20_000,
    ):
        with _raw(running_node) as tls:
            tls.sendall(sent)
            answer = _rest(tls)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"aiohttp" not in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": "this is not HTTP as it is spoken here"}
    assert "secret-words" not in running_node.log.read_text(errors="replace")


def test_without_a_certificate_there_is_no_connection(running_node):
    """Certificates alone: TLS itself refuses whoever has none, or one of another CA, or an older version."""
    for context in (tls_context(running_node, None), _stranger(running_node), _old(running_node)):
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
            _get_with(running_node, context)


def _stranger(node):
    context = tls_context(node, None)
    pki = node.root / "stranger-pki"
    context.load_cert_chain(pki / "mallory.pem", pki / "mallory.key")
    return context


def _old(node):
    context = tls_context(node)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def _get_with(node, context):
    with _raw(node, context) as tls:
        tls.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        if tls.recv(65536) == b"":
            raise EOFError


# --- a node with tokens, small limits and chatty denials


@pytest.fixture(scope="module")
def issuer():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def small_node(node_home, tmp_path_factory, issuer):
    """Tokens, limits that a test can reach, and policy data that names them in every way."""
    tight = {"requests_per_second": 0.001, "burst": 2, "concurrency": 2, "max_bytes": 65536, "max_batch": 2}
    data: dict[str, Any] = {
        "limits": {
            "limits": {"tight": tight, "roomy": {**tight, "burst": 1000, "concurrency": 64, "max_bytes": 1 << 20}},
            "default": "roomy",
            "subjects": {"jwt": {"counted": "tight"}},
        },
        "models": {"models": {"magika": {"limit": "tight"}, "orientation": {"sensitivity": "confidential"}}},
        "node": {"explain_denials": True},
        "roles": {"definitions": {"operator": {"grants": {"infer": {"mfa": True}}}}},
    }
    overrides = {
        "inference": {
            "tokens": {"jwks": "jwks.json", "audience": "edge-0001", "issuer": "https://issuer.example"},
            "body_timeout_ms": 300,
            "max_body_bytes": 1 << 20,
        }
    }

    def prepare(node):
        (node.root / "jwks.json").write_bytes(jwks(k1=issuer))
        (node.root / "policy.tar.gz").write_bytes(build_policy(node, "r-small", data))

    with start_node(node_home, tmp_path_factory.mktemp("node") / "n", overrides, prepare=prepare) as node:
        yield node


def _token(issuer, **claims):
    now = clock.now()
    whole = {
        "sub": "carol",
        "aud": "edge-0001",
        "iss": "https://issuer.example",
        "exp": now + 600,
        "roles": ["operator"],
    }
    return sign_token(issuer, {**whole, "amr": ["mfa"], **claims})


def _ask(node, token, model="tiny", who=None, inputs=None):
    return infer(node, model, inputs or TINY, who=who, headers=bearer(token) if token else None)


def test_a_token_identifies_without_a_certificate(small_node, issuer):
    """An ES256 token of the configured issuer is an identity of its own."""
    assert _ask(small_node, _token(issuer)).status == 200
    record = _last(small_node, kind="infer")
    assert (record["principal"], record["principal_kind"]) == ("carol", "jwt")


def test_a_token_goes_before_the_certificate(small_node, issuer):
    """With both, the token says who asks; a broken token is not mended by a good certificate."""
    assert _ask(small_node, _token(issuer), who="alice").status == 200
    assert _last(small_node, kind="infer")["principal"] == "carol"
    reply = _ask(small_node, _token(issuer, aud="other"), who="alice")
    _refused(small_node, 401, "token_audience", reply)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 1_000_000_000}, "token_expired"),
        ({"aud": "edge-0002"}, "token_audience"),
        ({"iss": "https://other.example"}, "token_issuer"),
        ({"nbf": 4_000_000_000}, "token_not_yet_valid"),
    ],
)
def test_a_token_that_does_not_hold_is_401(small_node, issuer, claims, reason):
    """An expired token, or one for another node, issuer or time, identifies nobody; the answer names the scheme."""
    reply = _refused(small_node, 401, reason, _ask(small_node, _token(issuer, **claims)))
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert "principal" not in _last(small_node)


def test_nobody_is_401(small_node):
    """Neither certificate nor token: 401, on every path but health."""
    _refused(small_node, 401, "no_identity", _ask(small_node, None))
    _refused(small_node, 401, "no_identity", call(small_node, "POST", "/v2/logging", who=None))
    assert call(small_node, "GET", "/v2/health/live", who=None).status == 200
    assert call(small_node, "GET", "/v2/health/ready", who=None).status == 200


def test_a_strangers_token_is_401(small_node):
    """A token signed by another key is refused, and no part of it is recorded."""
    token = _token(ec.generate_private_key(ec.SECP256R1()))
    _refused(small_node, 401, "token_signature", _ask(small_node, token))
    assert token.split(".")[2] not in json.dumps(records(small_node))


def test_a_second_factor_and_sensitivity_are_enforced(small_node, issuer):
    """Without the second factor, or above the role's reach, it is 403, with reasons where the policy explains itself."""
    reply = _ask(small_node, _token(issuer, amr=[]))
    _refused(small_node, 403, "policy", reply, principal="carol", reasons=["mfa_required"])
    assert reply.error == "denied by policy: mfa_required"
    picture = [{"name": "x", "datatype": "FP32", "shape": [1, 3, 224, 224], "data": [0] * (3 * 224 * 224)}]
    reply = _ask(small_node, _token(issuer), "orientation", inputs=picture)
    _refused(small_node, 403, "policy", reply, reasons=["sensitivity_not_granted"])


def test_a_subjects_own_limit_counts(small_node, issuer):
    """Past its burst a subject gets 429 with the time to wait, whatever the default allows."""
    replies = [_ask(small_node, _token(issuer, sub="counted")) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    assert int(replies[-1].headers["Retry-After"]) > 100
    _refused(small_node, 429, "rate", replies[-1], principal="counted")
    assert _ask(small_node, _token(issuer)).status == 200


def test_a_models_own_limit_counts(small_node, issuer):
    """A model with a limit of its own is metered by it for each principal, other models are not."""
    inputs = [{"name": "bytes", "datatype": "INT32", "shape": [1, 2048], "data": [0] * 2048}]
    token = _token(issuer, sub="dora")
    replies = [_ask(small_node, token, "magika", inputs=inputs) for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 200, 429]
    _refused(small_node, 429, "rate", replies[-1], principal="dora")
    assert _ask(small_node, token).status == 200


def test_a_slow_body_is_408(small_node, issuer):
    """A body that does not come in time is given up, with its record."""
    head = (
        f"POST {TINY_PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {_token(issuer)}\r\nContent-Length: 50\r\n\r\n"
    )
    with _raw(small_node, tls_context(small_node, None)) as tls:
        tls.sendall(head.encode() + b'{"inp')
        answer = _rest(tls)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    record = _last(small_node)
    assert (record["detail"]["reason"], record["principal"]) == ("body_timeout", "carol")
