"""A whole node for tests that ill-treat it: prepared once, copied for each test, and watched from outside.

What a node leaves behind is reparented to the test (it is a subreaper for the time), so that no process of it can hide.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.audit.reader import tail, verify_log
from agent.isolation.kernel import prctl
from tests.support.models import write_tiny
from tests.support.swtpm import SwTpm
from tools.demo_node import ROOT, DemoNode, edgewarden

__all__ = [
    "FORGOTTEN_SOCKETS",
    "ROOMY",
    "TINY_REQUEST",
    "ChaosNode",
    "Client",
    "Reply",
    "prepare_template",
    "running",
    "subreaper",
    "wait_until",
]

PATIENCE_S = 30.0
_PR_SET_CHILD_SUBREAPER = 36
TINY_REQUEST = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}]}
).encode()
# A reset in the middle of a handshake makes the ssl module of Python 3.11 forget its socket: the client's matter, and what these tests are about.
FORGOTTEN_SOCKETS = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
# On a busy machine a decision may take its time: these tests are about what is answered, not how fast.
ROOMY: Mapping[str, Mapping[str, Any]] = {
    "policy": {"evaluation_deadline_ms": 5_000, "total_deadline_ms": 20_000},
    "inference": {"drain_timeout_ms": 2_000},
}


def wait_until(what: str, holds: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait until ``holds()`` is true and return what it returned."""
    deadline = time.monotonic() + patience_s
    while not (result := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience_s:.0f} s: {what}")
        time.sleep(0.02)
    return result


@dataclass(frozen=True, slots=True)
class Reply:
    """What the inference API answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def decision_id(self) -> str:
        return self.headers.get("EdgeWarden-Decision-Id", "")

    @property
    def error(self) -> str:
        return str(json.loads(self.body)["error"])


class Client:
    """One TLS client of the inference API; a connection is kept as long as it works."""

    def __init__(self, node: ChaosNode, name: str | None = "alice", timeout_s: float = PATIENCE_S) -> None:
        self._node = node
        self._timeout_s = timeout_s
        self._context = node.tls(name)
        self._connection: HTTPSConnection | None = None

    def infer(self, model: str = "tiny", body: bytes = TINY_REQUEST) -> Reply:
        """Ask a model; raises ``OSError`` or ``HTTPException`` where there is no answer."""
        return self.request("POST", f"/v2/models/{model}/infer", body, {"Content-Type": "application/json"})

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Make any call."""
        if self._connection is None:
            self._connection = HTTPSConnection(
                "127.0.0.1", self._node.port, context=self._context, timeout=self._timeout_s
            )
        try:
            self._connection.request(method, path, body, dict(headers or {}))
            response = self._connection.getresponse()
            return Reply(response.status, dict(response.headers.items()), response.read())
        except (OSError, HTTPException):
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ChaosNode(DemoNode):
    """A node with the means to look at it from outside."""

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the agent and do not wait for anything."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.cli", "run", "--config", str(self.config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def fail_to_start(self) -> tuple[int, str]:
        """Start an agent that can't serve; returns its exit status and its last words, which must be one clear line."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        process = self.launch()
        status = process.wait(60)
        self.process = None
        text = self.log.read_bytes()[begin:].decode()
        assert "Traceback" not in text, text
        words = [line for line in text.splitlines() if line.startswith("edgewarden: ")]
        assert len(words) == 1, text
        return status, words[0]

    def tls(self, name: str | None = "alice") -> ssl.SSLContext:
        """Return a client's TLS context, with its certificate unless ``name`` is None."""
        files = self.client_files(name or "alice")
        context = ssl.create_default_context(cafile=files["ca"])
        if name is not None:
            context.load_cert_chain(files["cert"], files["key"])
        return context

    def connect(self, name: str | None = "alice") -> ssl.SSLSocket:
        """Open a bare TLS connection."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        return self.tls(name).wrap_socket(sock, server_hostname="127.0.0.1")

    def alive(self) -> bool:
        """Whether the agent runs."""
        return self.process is not None and self.process.poll() is None

    def children(self, name: str = "ew-") -> list[psutil.Process]:
        """Return the agent's living children whose name begins so."""
        found = []
        if self.process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                            found.append(child)
        return found

    def descriptors(self) -> dict[str, int]:
        """Return how many descriptors the agent and its gateway hold."""
        assert self.process is not None
        (gateway,) = self.children("ew-gateway")
        return {"agent": _count_fds(self.process.pid), "gateway": _count_fds(gateway.pid)}

    def health(self) -> dict[str, Any]:
        """Return every fact with its reason."""
        status, facts = self.local("GET", "/health", surface="health")
        assert status == 200
        return dict(facts)

    def fact(self, name: str) -> bool:
        """Return whether a fact holds."""
        return bool(self.health()[name]["holds"])

    def models(self) -> dict[str, str]:
        """Return the state of each model by ``name/version``."""
        status, answer = self.local("POST", "/admin/v1/models/rescan")
        assert status == 200, answer
        return {f"{model['name']}/{model['version']}": model["state"] for model in answer["models"]}

    def records(self) -> list[dict[str, Any]]:
        """Return every record of a log that verifies."""
        directory = self.root / "state" / "audit"
        report = verify_log(directory)
        assert not [finding for finding in report.findings if finding.check != "torn-end"], report.findings
        return [json.loads(record) for record in tail(directory, 10**7)]

    def appraise(self, packages: list[Path], previous_policy: str | None = None) -> dict[str, Any]:
        """Fetch Evidence and let the command line appraise it; returns its JSON. The previous policy is approved besides."""
        files = {name: self.root / f"appraisal.{name}" for name in ("reference", "evidence", "ak")}
        for path in files.values():
            path.unlink(missing_ok=True)
        chosen = [part for package in packages for part in ("--package", package)]
        policy = ("--policy", self.root / "policy.tar.gz", "--out", files["reference"])
        edgewarden("attest", "reference", "--config", self.config, *policy, *chosen)
        reference = json.loads(files["reference"].read_bytes())
        reference["policy"]["previous"] = previous_policy
        files["reference"].write_text(json.dumps(reference))
        nonce = os.urandom(32).hex()
        admin = self.root / "run" / "admin.sock"
        fetched = ("--nonce", nonce, "--out", files["evidence"], "--ak-out", files["ak"])
        edgewarden("attest", "evidence", "--socket", admin, *fetched)
        given = ("--evidence", files["evidence"], "--nonce", nonce, "--ak", files["ak"])
        done = edgewarden("attest", "verify", *given, "--reference", files["reference"], "--json", check=False)
        return dict(json.loads(done.stdout))


def _count_fds(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def prepare_template(directory: Path) -> Path:
    """Write everything that does not depend on the test: keys, one small package, the policy."""
    node = ChaosNode(directory, "", ROOMY)
    node.prepare()
    node.sign_and_install(write_tiny(directory / "packages" / "tiny" / "1"))
    node.build_policy()
    return directory


@contextlib.contextmanager
def running(
    template: Path, directory: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None, *, start: bool = True
) -> Iterator[tuple[ChaosNode, SwTpm]]:
    """Give a copy of the template with a TPM of its own; ends both."""
    shutil.copytree(template, directory / "node", symlinks=True)
    merged = {section: dict(values) for section, values in ROOMY.items()}
    for section, values in (overrides or {}).items():
        merged[section] = {**merged.get(section, {}), **values}
    with SwTpm(directory) as tpm:
        node = ChaosNode(directory / "node", tpm.tcti, merged)
        node.configure()
        try:
            if start:
                node.start()
            yield node, tpm
        finally:
            node.stop(signal.SIGKILL)


@contextlib.contextmanager
def subreaper() -> Iterator[Callable[[set[int]], None]]:
    """Become the parent of orphans; gives a check that none is left besides the processes whose ids it is given."""

    def check(expected: set[int]) -> None:
        def none_left() -> bool:
            left = [child for child in psutil.Process().children() if child.pid not in expected]
            for child in left:
                if child.status() == psutil.STATUS_ZOMBIE:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(child.pid, os.WNOHANG)
            return not left

        wait_until("no orphan is left", none_left)

    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield check
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)
