"""The shipped policy in both engines, for tests that ask them the same questions.

1. Both engines read the same files: ``rego/**/*.rego`` without tests and ``<policies>/<area>/data.yaml``.
2. Both run with strict builtin errors. An error is a denial: it answers ``None``.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import regorus
import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DECISION", "OPA", "POLICIES", "REGO", "ROOT", "Embedded", "OpaServer", "opa", "opa_server", "policy_data"]

ROOT: Final = Path(__file__).resolve().parents[2]
REGO: Final = ROOT / "rego"
POLICIES: Final = ROOT / "policies"
OPA: Final = ROOT / ".cache/bin/opa"
DECISION: Final = "data.edgewarden.authz.decision"

OPA_TIMEOUT_S: Final = 100
OPA_START_S: Final = 20


def policy_data(policies: Path = POLICIES) -> dict[str, Any]:
    """The areas of a policies folder, as the ``data`` document that a bundle of it makes."""
    return {path.parent.name: yaml.safe_load(path.read_text()) for path in sorted(policies.glob("*/data.yaml"))}


@dataclass(frozen=True, slots=True)
class Embedded:
    """The shipped rules in the embedded engine."""

    engine: Any

    @classmethod
    def load(cls, policies: Path = POLICIES) -> Embedded:
        """Load the rules, and the data of a policies folder."""
        return cls.of(policy_data(policies))

    @classmethod
    def of(cls, data: dict[str, Any], *, without: str = "") -> Embedded:
        """Load the rules, with this ``data`` document; ``without`` names a file of rules that is left out."""
        engine = regorus.Engine()
        for path in sorted(REGO.rglob("*.rego")):
            if not path.name.endswith("_test.rego") and path.name != without:
                engine.add_policy(str(path.relative_to(REGO)), path.read_text())
        engine.add_data_json(json.dumps(data))
        engine.set_input_json("{}")
        # The first evaluation prepares the rules; a clone of a prepared engine need not do it again.
        engine.eval_rule_as_json(DECISION)
        return cls(engine)

    def decide(self, document: Any) -> Any:
        """The decision on one input, or None for an error."""
        engine = self.engine.clone()
        engine.set_input_json(json.dumps(document))
        try:
            return json.loads(engine.eval_rule_as_json(DECISION))
        except RuntimeError:
            return None


def opa(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the OPA binary at the root of the repository."""
    return subprocess.run(
        [str(OPA), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=OPA_TIMEOUT_S,
    )


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=OPA_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class OpaServer:
    """The shipped rules in a running OPA."""

    connection: http.client.HTTPConnection

    def decide(self, document: Any) -> Any:
        """The decision on one input, or None for an error."""
        path = "/v1/data/" + DECISION.removeprefix("data.").replace(".", "/")
        self.connection.request("POST", f"{path}?strict-builtin-errors=true", json.dumps({"input": document}))
        response = self.connection.getresponse()
        body = json.loads(response.read())
        return body["result"] if response.status == http.client.OK else None


@contextmanager
def opa_server(policies: Path = POLICIES) -> Iterator[OpaServer]:
    """Run OPA with the rules and the data of a policies folder, on a Unix socket, until the block ends."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "opa.sock"
        command = [
            str(OPA),
            "run",
            "--server",
            "--addr",
            f"unix://{path}",
            "--log-level",
            "error",
            "-b",
            str(REGO),
            str(policies),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
            connection = _UnixConnection(path)
            try:
                _connect(connection, process)
                yield OpaServer(connection)
            finally:
                connection.close()
                process.terminate()


def _connect(connection: http.client.HTTPConnection, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + OPA_START_S
    while True:
        try:
            return connection.connect()
        except OSError:
            connection.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
