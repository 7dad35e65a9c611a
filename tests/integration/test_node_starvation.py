"""One who floods, and one who only wants an answer: the second gets it, always, and nothing grows without end."""

import contextlib
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from http.client import HTTPException, HTTPSConnection
from typing import Self

import psutil
import pytest

from agent.control.serving import MAX_CONNECTIONS
from agent.flows.refusals import RECORDS_PER_SECOND
from tests.support.chaos import FORGOTTEN_SOCKETS, TINY_REQUEST, Client, prepare_template, running, wait_until
from tests.support.identity import jwks
from tests.support.models import new_key
from tools.pki import Authority

PER_SOURCE = 24
TOTAL = 64
RAW_CONNECTIONS = 700
GOOD_REQUESTS = 150
GOOD_ADDRESS = "127.0.0.2"
LIMITS = {
    "inference": {
        "max_connections": TOTAL,
        "max_connections_per_source": PER_SOURCE,
        "header_timeout_ms": 2_000,
        "body_timeout_ms": 2_000,
    }
}

pytestmark = [FORGOTTEN_SOCKETS, pytest.mark.integration]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return prepare_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module", autouse=True)
def _descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Flood:
    """Everything that a hostile client with a certificate does at the same time, from its own address."""

    def __init__(self, node) -> None:
        self._node = node
        self._stop = threading.Event()
        self.seen: Counter[str] = Counter()
        ways = [self._raw, self._slow_headers, self._slow_body, self._big_body, self._rate, self._rate]
        self._threads = [threading.Thread(target=self._again, args=(way,)) for way in ways]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _again(self, way) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, HTTPException):
                way()
            self._stop.wait(0.01)

    def _raw(self) -> None:
        """Connections that never say a word."""
        with contextlib.ExitStack() as stack:
            for _ in range(RAW_CONNECTIONS):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", self._node.port))
            self.seen["raw"] += 1
            self._stop.wait(1.0)

    def _slow_headers(self) -> None:
        with self._node.connect() as sock:
            for byte in b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 1000:
                sock.send(bytes([byte]))
                self.seen["slow headers"] += 1
                if self._stop.wait(0.05):
                    return

    def _slow_body(self) -> None:
        with self._node.connect() as sock:
            sock.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")
            for _ in range(5000):
                sock.send(b"[")
                self.seen["slow body"] += 1
                if self._stop.wait(0.05):
                    return

    def _big_body(self) -> None:
        client = Client(self._node, timeout_s=5.0)
        reply = client.infer(body=b" " * (9 << 20))
        self.seen[f"big {reply.status}"] += 1
        client.close()

    def _rate(self) -> None:
        client = Client(self._node, timeout_s=5.0)
        for _ in range(200):
            self.seen[f"rate {client.infer().status}"] += 1
        client.close()


def good_client(node) -> HTTPSConnection:
    return HTTPSConnection(
        "127.0.0.1", node.port, context=node.tls("good"), timeout=30, source_address=(GOOD_ADDRESS, 0)
    )


@pytest.mark.slow
def test_who_floods_does_not_take_the_place_of_who_does_not(template, tmp_path):
    """All requests of a good client succeed, on old connections and on new ones; connections and records stay bounded."""
    with running(template, tmp_path, LIMITS) as (node, _):
        Authority.open(node.root / "pki").client("good", ("operator",))
        before = len(node.records())
        began = time.monotonic()
        statuses: Counter[int] = Counter()
        most = 0
        with Flood(node) as flood:
            wait_until("the flood runs", lambda: flood.seen["raw"] and flood.seen["rate 429"])
            kept = good_client(node)
            for number in range(GOOD_REQUESTS):
                connection = kept if number % 2 else good_client(node)
                connection.request("POST", "/v2/models/tiny/infer", TINY_REQUEST)
                response = connection.getresponse()
                statuses[response.status] += 1
                response.read()
                if connection is not kept:
                    connection.close()
                most = max(most, node.descriptors()["gateway"])
            kept.close()
        seconds = time.monotonic() - began + 2
        assert statuses == {200: GOOD_REQUESTS}
        assert most < TOTAL + 60
        assert {"raw", "slow headers", "slow body", "rate 429"} <= set(flood.seen)
        node.stop()
        records = node.records()[before:]
        refusals = [record for record in records if record["kind"] == "refusal"]
        alone = [record for record in refusals if record["detail"]["reason"] != "repeated"]
        counted = sum(record["detail"]["count"] for record in refusals if record["detail"]["reason"] == "repeated")
        assert len(alone) <= RECORDS_PER_SECOND * (seconds + 1)
        assert counted > len(alone)


def test_callers_without_identity_do_not_fill_the_log(template, tmp_path):
    """A thousand 401 answers are some dozens of records, and the number is in the log all the same."""
    accepted = {"jwks": "jwks.json", "audience": "edge"}
    overrides = {"inference": {"tokens": accepted}}
    with running(template, tmp_path, overrides, start=False) as (node, _):
        (node.root / "jwks.json").write_bytes(jwks(a=new_key()))
        node.start()
        client = Client(node, None)
        statuses = Counter(client.infer().status for _ in range(1000))
        client.close()
        assert statuses == {401: 1000}
        node.stop()
        refusals = [record for record in node.records() if record["kind"] == "refusal"]
        counts = [record["detail"].get("count", 0) for record in refusals]
        alone = counts.count(0)
        assert alone + sum(counts) == 1000
        assert len(refusals) < 500


def test_idle_connections_to_the_agent_itself_are_bounded(template, tmp_path):
    """Anyone on the host may ask for the health; nobody can take all descriptors of the agent by it."""
    with running(template, tmp_path) as (node, _), contextlib.ExitStack() as stack:
        before = node.descriptors()["agent"]
        for _ in range(1000):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(node.root / "run" / "health.sock"))
        assert node.fact("live")
        assert node.local("GET", "/admin/v1/status")[0] == 200
        assert node.descriptors()["agent"] <= before + 2 * MAX_CONNECTIONS


def test_a_controller_that_never_speaks_does_not_stop_another(template, tmp_path):
    """The control listener bounds handshakes, and Evidence is served again once they are over."""
    control = {"listen": "127.0.0.1:0", "certificate": "pki/node.pem", "key": "pki/node.key", "client_ca": "pki/ca.pem"}
    with running(template, tmp_path, {"control": control}) as (node, _), contextlib.ExitStack() as stack:
        port = control_port(node)
        before = node.descriptors()["agent"]
        for _ in range(500):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
        assert node.fact("live")
        assert node.descriptors()["agent"] <= before + 2 * MAX_CONNECTIONS
        stack.close()

        def served() -> bool:
            with contextlib.suppress(OSError, ssl.SSLError):
                connection = HTTPSConnection("127.0.0.1", port, context=node.tls(), timeout=5)
                with contextlib.closing(connection):
                    connection.request("GET", f"/attestation/v1/evidence?nonce={'ab' * 32}")
                    return connection.getresponse().status == 200
            return False

        wait_until("Evidence over the network", served)


def control_port(node) -> int:
    listening = {
        one.laddr.port
        for one in psutil.Process(node.process.pid).net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    (port,) = listening - {node.port}
    return int(port)
