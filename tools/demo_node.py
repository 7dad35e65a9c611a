"""A whole node below one directory: keys, packages, policy, configuration and a software TPM, for the demo, the tests and the bench.

Every step is the command that an operator would type; nothing here reaches around the product.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import yaml

from tools.example_models import write_magika, write_orientation
from tools.pki import Authority, write_signing_key
from tools.software_tpm import SoftwareTpm

__all__ = ["DemoNode", "SoftwareTpm", "UnixConnection", "edgewarden"]

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


def edgewarden(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line of this very checkout."""
    command = [sys.executable, "-m", "agent.cli", *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)


class UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Blocking: with a time-out, a Unix socket does not wait for a place in the listener's queue.
        self.sock.connect(str(self._path))
        self.sock.settimeout(30)


@dataclass(slots=True)
class DemoNode:
    """One node.

    Attributes:
        root: everything lies below it.
        tcti: the TPM to measure into.
        overrides: sections of the configuration that replace or extend the default one.
    """

    root: Path
    tcti: str
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.root / "edgewarden.yaml"

    @property
    def log(self) -> Path:
        """What the agent prints."""
        return self.root / "agent.log"

    @property
    def store(self) -> Path:
        """Where packages are installed."""
        return self.root / "models"

    def prepare(self) -> None:
        """Make certificates, signing keys and the configuration."""
        self.root.mkdir(parents=True, exist_ok=True)
        authority = Authority.create(self.root / "pki")
        authority.server("node")
        authority.client("alice", ("operator",))
        authority.client("eve", ("visitor",))
        write_signing_key(self.root / "keys", "models")
        write_signing_key(self.root / "keys", "policy")
        write_signing_key(self.root / "keys", "stranger")
        self.configure()

    def configure(self) -> None:
        """Write the configuration."""
        document: dict[str, dict[str, Any]] = {
            "node": {"id": "edge-0001", "state_dir": "state", "runtime_dir": "run"},
            "tpm": {"tcti": self.tcti},
            "models": {"store": "models", "trusted_keys": ["keys/models.pub"]},
            "policy": {"bundle": "policy.tar.gz", "trusted_keys": ["keys/policy.pub"]},
            "inference": {
                "listen": "127.0.0.1:0",
                "certificate": "pki/node.pem",
                "key": "pki/node.key",
                "client_ca": "pki/ca.pem",
            },
            "sandbox": {"required": True},
        }
        for section, values in self.overrides.items():
            document[section] = {**document.get(section, {}), **values}
        self.config.write_text(yaml.safe_dump(document, sort_keys=False))

    def write_packages(self) -> list[Path]:
        """Write the two real models as packages, unsigned."""
        drafts = self.root / "packages"
        return [
            write_orientation(drafts / "orientation" / "1.0.0"),
            write_magika(drafts / "magika" / "3.3.0"),
        ]

    def sign_and_install(self, package: Path, key: str = "models") -> None:
        """Sign a package and put it into the store."""
        edgewarden("model", "sign", package, "--key", self.root / "keys" / f"{key}.key")
        edgewarden("model", "install", package, "--store", self.store, "--trust", self.root / "keys" / "models.pub")

    def build_policy(
        self, rego: Path = ROOT / "rego", policies: Path = ROOT / "policies", revision: str = "r1"
    ) -> Path:
        """Build and sign the policy bundle."""
        bundle = self.root / "policy.tar.gz"
        edgewarden("policy", "build", rego, policies, "--revision", revision, "--output", bundle)
        edgewarden("policy", "sign", bundle, "--key", self.root / "keys" / "policy.key")
        return bundle

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the agent and wait until it serves."""
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent.cli", "run", "--config", str(self.config)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=None if environment is None else dict(environment),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the agent ended with {self.process.returncode}:\n{self._tail(begin)}")
            for event in self.events(begin):
                if event.get("event") == "serving":
                    self.port = int(event["port"])
                    return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError(f"the agent does not serve:\n{self._tail(begin)}")

    def events(self, begin: int = 0) -> list[dict[str, Any]]:
        """Return the agent's log lines, parsed."""
        with self.log.open("rb") as log:
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        events = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                events.append(json.loads(line))
        return events

    def _tail(self, begin: int) -> str:
        return self.log.read_bytes()[begin:][-4000:].decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the agent; returns its exit status."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = None
        return status

    def local(self, method: str, path: str, body: bytes | None = None, *, surface: str = "admin") -> tuple[int, Any]:
        """Call the agent on a Unix socket; returns status and JSON."""
        connection = UnixConnection(self.root / "run" / f"{surface}.sock")
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(data) if is_json else data.decode()

    def client_files(self, name: str) -> dict[str, str]:
        """Return the files that a client of this name uses."""
        pki = self.root / "pki"
        return {"ca": str(pki / "ca.pem"), "cert": str(pki / f"{name}.pem"), "key": str(pki / f"{name}.key")}

    def url(self, path: str) -> str:
        """Return the inference API's address of a path."""
        return f"https://127.0.0.1:{self.port}{urllib.parse.quote(path)}"
