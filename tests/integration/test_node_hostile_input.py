"""A node among hostile bytes: on its TLS port, in HTTP, on its Unix sockets and in its model store. It stays alive, leaks nothing and goes on answering."""

import contextlib
import json
import os
import random  # noqa: TID251 -- seeded below
import re
import socket
import ssl
import struct

import psutil
import pytest

from tests.support.chaos import (
    FORGOTTEN_SOCKETS,
    TINY_REQUEST,
    ChaosNode,
    Client,
    prepare_template,
    running,
    wait_until,
)
from tests.support.models import write_tiny

SEED = 7
ROUNDS = 3
DESCRIPTORS_SPARE = 6
MEMORY_SPARE_BYTES = 24 << 20
PATH = b"/v2/models/tiny/infer"
LENGTH = str(len(TINY_REQUEST)).encode()
GOOD = b"POST " + PATH + b" HTTP/1.1\r\nHost: x\r\nContent-Length: " + LENGTH + b"\r\n\r\n" + TINY_REQUEST
CLOSE = b"Connection: close\r\n"  # where the request's end is beyond doubt, only the client ends the connection
SMUGGLED = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"

pytestmark = [FORGOTTEN_SOCKETS, pytest.mark.integration]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def node(template, tmp_path_factory):
    overrides = {"inference": {"header_timeout_ms": 1_000, "body_timeout_ms": 1_000}}
    with running(template, tmp_path_factory.mktemp("node"), overrides) as (running_node, _):
        yield running_node


def post(headers: bytes, body: bytes = b"") -> bytes:
    return b"POST " + PATH + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


# Each: what is sent, and what may come back for it. Never more than one answer: what follows a doubtful request is not a request.
ONE_REFUSAL = {
    "both lengths": post(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "both lengths, other order": post(b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n" + SMUGGLED),
    "two lengths": post(b"Content-Length: 5\r\nContent-Length: 6\r\n", b"12345" + SMUGGLED),
    "a list of lengths": post(b"Content-Length: 5, 5\r\n", b"12345" + SMUGGLED),
    "a length with a sign": post(b"Content-Length: +5\r\n", b"12345" + SMUGGLED),
    "a negative length": post(b"Content-Length: -5\r\n", SMUGGLED),
    "a hexadecimal length": post(b"Content-Length: 0x5\r\n", b"12345" + SMUGGLED),
    "a length without end": post(b"Content-Length: " + b"9" * 400 + b"\r\n", SMUGGLED),
    "a coding that is none": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "chunked, not at the end": post(b"Transfer-Encoding: chunked, gzip\r\n", b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + SMUGGLED),
    "a space before the colon": post(b"Content-Length : 5\r\n", b"12345" + SMUGGLED),
    "a folded header": post(b"X-A: b\r\n c\r\n", SMUGGLED),
    "a zero byte in a header": post(b"X-A: b\0c\r\n", SMUGGLED),
    "a chunk size that is none": post(b"Transfer-Encoding: chunked\r\n", b"zz\r\n" + SMUGGLED),
    "a chunk size without end": post(b"Transfer-Encoding: chunked\r\n", b"f" * 64 + b"\r\n" + SMUGGLED),
    "too many headers": post(b"".join(b"X-%d: y\r\n" % n for n in range(2_000))),
    "a header too long": post(b"X-A: " + b"y" * 100_000 + b"\r\n"),
    "a line too long": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n" + SMUGGLED,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version that is none": b"GET /v2 HTTP/9.9\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "too large in chunks": post(CLOSE + b"Transfer-Encoding: chunked\r\n", chunked(*[b" " * 65_536] * 140)),
    "too large": post(CLOSE + b"Content-Length: 99999999\r\n", b" " * 100_000),
    "gzip": post(CLOSE + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n", b"\x1f\x8b\x08\x00"),
    "nesting": post(CLOSE + b"Content-Length: 200000\r\n", b"[" * 200_000),
    "no JSON": post(CLOSE + b"Content-Length: 4\r\n", b"\xff\xfe{}"),
    "duplicate keys": post(CLOSE + b"Content-Length: 24\r\n", b'{"inputs":[],"inputs":[]'),
    "a header length that lies": post(CLOSE + b"Inference-Header-Content-Length: 999\r\nContent-Length: 2\r\n", b"{}"),
    "a negative header length": post(CLOSE + b"Inference-Header-Content-Length: -1\r\nContent-Length: 2\r\n", b"{}"),
}


def exchange(node: ChaosNode, data: bytes, *, half_close: bool = False) -> bytes:
    """Send bytes over TLS and return all that comes back until the other side is done."""
    answer = b""
    with node.connect() as sock, contextlib.suppress(OSError):
        sock.settimeout(10)
        with contextlib.suppress(OSError):  # cut before all was sent; the answer may be there all the same
            sock.sendall(data)
        if half_close:
            socket.socket.shutdown(sock, socket.SHUT_WR)
        while (part := sock.recv(65_536)) != b"":
            answer += part
    return answer


@pytest.mark.parametrize("case", ONE_REFUSAL)
def test_a_doubtful_request_is_refused_and_ends_its_connection(node, case):
    """4xx once, or the connection is cut; nothing of what follows is taken for a request, and the next client is served."""
    answer = exchange(node, ONE_REFUSAL[case])
    assert answer.count(b"HTTP/1.") <= 1, answer
    assert not answer or re.match(rb"HTTP/1\.[01] 4", answer), answer
    assert b"Traceback" not in answer
    assert still_serves(node)


def still_serves(node: ChaosNode) -> bool:
    client = Client(node)
    status = client.infer().status
    client.close()
    return node.alive() and status == 200


def test_pipelined_requests_are_answered_in_order(node):
    """Ten in one write are ten answers."""
    last = GOOD.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    assert exchange(node, GOOD * 9 + last).count(b"HTTP/1.1 200") == 10


def test_a_client_that_closes_its_half_gets_its_answer_or_none(node):
    """Neither a hang nor a crash; half a request is none."""
    exchange(node, GOOD, half_close=True)
    assert b"HTTP/1.1 2" not in exchange(node, GOOD[:-10], half_close=True)
    assert still_serves(node)


def test_bytes_that_are_no_tls_are_cut(node):
    """Garbage, plain HTTP, an old TLS and a stranger's certificate: no answer worth the name, and the next client is served."""
    chance = random.Random(SEED)  # noqa: S311 -- bytes to throw, nothing secret
    hello = b"\x16\x03\x01" + struct.pack(">H", 16_000) + b"\x01" + bytes(2000)
    for data in (b"GET / HTTP/1.1\r\n\r\n", chance.randbytes(5000), b"\x16\x03\x01\x00\x05abcde", b"", hello):
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            assert b"HTTP" not in sock.recv(4096)
    old = node.tls()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", node.port)) as sock,
        pytest.raises(OSError, match=r"(?i)protocol|version|eof|reset"),
    ):
        old.wrap_socket(sock, server_hostname="127.0.0.1")
    assert still_serves(node)


def test_nothing_leaks_over_many_of_them(node):
    """Descriptors and memory of agent and gateway are after several rounds what they were after the first."""

    def everything() -> None:
        for data in ONE_REFUSAL.values():
            exchange(node, data)
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", node.port)) as sock:
                sock.sendall(b"junk")
        for _ in range(20):
            node.local("GET", f"/attestation/v1/evidence?nonce={os.urandom(32).hex()}")
            node.local("PUT", "/admin/v1/policy", b"no bundle")

    everything()
    before, memory = settled(node), resident(node)
    for _ in range(ROUNDS):
        everything()
    after = settled(node)
    assert all(after[name] <= before[name] + DESCRIPTORS_SPARE for name in before), (before, after)
    grown = {name: size - memory[name] for name, size in resident(node).items()}
    assert max(grown.values()) < MEMORY_SPARE_BYTES, grown
    assert still_serves(node)


def settled(node: ChaosNode) -> dict[str, int]:
    """Return the descriptors once the connections of before are gone."""
    seen = [node.descriptors()]

    def quiet() -> bool:
        seen.append(node.descriptors())
        return seen[-1] == seen[-2]

    wait_until("descriptors settle", quiet)
    return seen[-1]


def resident(node: ChaosNode) -> dict[str, int]:
    assert node.process is not None
    (gateway,) = node.children("ew-gateway")
    return {"agent": psutil.Process(node.process.pid).memory_info().rss, "gateway": gateway.memory_info().rss}


ADMIN_CALLS = [
    ("GET", "/attestation/v1/evidence", None, 400),
    ("GET", "/attestation/v1/evidence?nonce=" + "zz" * 32, None, 400),
    ("GET", "/attestation/v1/evidence?nonce=" + "AB" * 32, None, 400),
    ("GET", "/attestation/v1/evidence?nonce=" + "ab" * 32 + "&from=-1", None, 400),
    ("GET", "/attestation/v1/evidence?nonce=" + "ab" * 32 + "&from=999999999", None, 400),
    ("GET", "/attestation/v1/evidence?nonce=" + "ab" * 32 + "&from=%D9%A1", None, 400),
    ("GET", "/admin/v1/nothing", None, 404),
    ("GET", "/../../etc/passwd", None, 404),
    ("DELETE", "/admin/v1/policy", None, 405),
    ("PUT", "/admin/v1/policy", b"", 422),
    ("PUT", "/admin/v1/policy", b"\x1f\x8b junk", 422),
    ("PUT", "/admin/v1/policy", b" " * (33 << 20), 413),
    ("POST", "/admin/v1/models/rescan", b"x" * 100, 200),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), ADMIN_CALLS)
def test_a_call_of_the_operator_that_is_none_is_refused(node, method, path, body, status):
    """4xx with one clear line; the policy in force stays."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read what it refuses
        seen, answer = node.local(method, path, body)
        assert seen == status, answer
        if status != 200:
            assert answer["error"]
            assert "Traceback" not in json.dumps(answer)
    assert node.local("GET", "/admin/v1/policy")[1]["revision"] == "r1"


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 5000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
        SMUGGLED * 200,
        b"PUT /admin/v1/policy HTTP/1.1\r\nContent-Length: 9\r\n",
    ],
)
@pytest.mark.parametrize("surface", ["admin", "health"])
def test_garbage_on_a_unix_socket_is_no_matter(node, surface, data):
    """The agent's own parser refuses it and goes on."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(2)
        sock.connect(str(node.root / "run" / f"{surface}.sock"))
        sock.sendall(data)
        sock.recv(65_536)
    assert node.fact("live")
    assert "Traceback" not in node.log.read_text()


def test_junk_in_the_store_is_refused_by_name(template, tmp_path):
    """Files at odd levels, links, pipes, sockets, devices, crowds and unreadable folders: nothing hangs, and the good model serves, before and after a restart."""
    with running(template, tmp_path) as (node, _), socket.socket(socket.AF_UNIX) as listener:
        strange = make_junk(node, listener)
        wait_until("looked at", lambda: strange.keys() <= node.models().keys())
        states = node.models()
        assert {name: states[name] for name in strange} == strange
        assert states["tiny/1"] == "loaded"
        assert still_serves(node)
        refused = {
            f"{record['model']}/{record['version']}" for record in node.records() if record["kind"] == "model.refuse"
        }
        assert strange.keys() <= refused
        assert node.stop() == 0
        node.start()
        assert node.models() == states
        assert still_serves(node)
        assert node.appraise([node.root / "packages" / "tiny" / "1"])["status"] == "affirming"


def make_junk(node: ChaosNode, listener: socket.socket) -> dict[str, str]:
    """Fill the store with what is no package; returns what must be refused."""
    store = node.store
    (store / "file").write_text("no package")
    (store / ".hidden").mkdir()
    (store / "loop").symlink_to(store / "loop")
    (store / "etc").symlink_to("/etc")
    (store / "empty").mkdir()
    (store / "file-for-version").mkdir()
    (store / "file-for-version" / "1").write_text("x")
    os.mkfifo(store / "fifo-for-name")
    refused = {}

    def package(name: str, version: str = "1"):
        directory = store / name / version
        directory.parent.mkdir(exist_ok=True)
        write_tiny(directory, name=name)
        refused[f"{name}/{version}"] = "refused"
        return directory

    (store / "nothing" / "1").mkdir(parents=True)
    refused["nothing/1"] = "refused"
    package("unsigned")
    os.mkfifo(package("pipe") / "model.sig")
    model = package("pipe-for-model") / "model.onnx"
    model.unlink()
    os.mkfifo(model)
    listener.bind(str(package("socket") / "s"))
    (package("link") / "model.sig").symlink_to(store / "tiny" / "1" / "model.sig")
    deep = package("deep") / "/".join("d" * 20)
    deep.mkdir(parents=True)
    crowd = package("crowd")
    for number in range(400):
        (crowd / f"f{number}").write_bytes(b"")
    with (package("sparse") / "huge").open("wb") as file:
        file.truncate(1 << 42)
    with (package("wide") / "model.yaml").open("wb") as file:
        file.write(b"a: &a [" + b"x," * 100_000)
    for odd in ("with space", "new\nline", "ünicode", "-dash", "tag;rm"):
        (store / odd / "1").mkdir(parents=True)
    bad = os.fsencode(store) + b"/not-\xff-utf8"
    os.makedirs(bad + b"/1")  # noqa: PTH103 -- pathlib has no names of bytes
    if os.geteuid() == 0:
        os.mknod(package("device") / "null", 0o666 | 0o020000, os.makedev(1, 3))
    else:
        (package("closed") / "secret").mkdir(mode=0)
    return refused
