"""A controller for tests: real TLS, a real database; in this process, or as the process that an operator starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml
from click.testing import CliRunner

from agent.attest.enrolment import JoinToken
from controller.cli.service import command
from controller.service import Controller
from controller.settings import load
from tests.support.attest import CONFIG, MODEL, PCR, POLICY

__all__ = ["APPROVAL", "ControllerProcess", "Desk", "access", "admin_context", "controller_home", "desk", "eventually"]

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 30

APPROVAL = {
    "policy": POLICY.hex(),
    "config": CONFIG.hex(),
    "pcr": PCR,
    "models": {"m/1/model.onnx": MODEL.hex()},
}


def controller_home(folder: Path, vendor: bytes, *options: str, **changes: Any) -> Path:
    """``edgewarden controller init``, then changes to its settings; returns the settings file."""
    home = folder / "controller"
    outcome = CliRunner().invoke(
        command, ["init", str(home), "--url", "https://localhost:1", *options], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    (home / "vendor.pem").write_bytes(vendor)
    path = home / "controller.yaml"
    document = yaml.safe_load(path.read_text())
    document |= {"listen": "127.0.0.1:0", "enrolment": {"ek_roots": ["vendor.pem"], "per_minute": 1000}} | changes
    path.write_text(yaml.safe_dump(document))
    return path


@dataclass
class Desk:
    """An admin's access to a running controller; ``metrics`` is the address of its other listener, where it has one."""

    url: str
    admin: aiohttp.ClientSession
    anyone: aiohttp.ClientSession
    metrics: str = ""

    async def call(self, method: str, path: str, body: Any = None, *, expect: int = 200) -> Any:
        async with self.admin.request(method, self.url + path, json=body) as answer:
            text = await answer.text()
            assert answer.status == expect, text
            return await answer.json()

    async def approve(self, **changes: Any) -> Any:
        return await self.call("POST", "/v1/groups/default/references", APPROVAL | changes, expect=201)

    async def token(self, **changes: Any) -> JoinToken:
        answer = await self.call("POST", "/v1/tokens", {"group": "default", **changes}, expect=201)
        return JoinToken.parse(answer["token"])

    async def node(self, name: str) -> Any:
        return await self.call("GET", f"/v1/nodes/{name}")

    async def records(self, kind: str) -> list[Any]:
        return [record for record in await self.call("GET", "/v1/audit?limit=1000") if record["kind"] == kind]


def admin_context(home: Path, name: str | None) -> ssl.SSLContext:
    """TLS towards the controller: as the admin of that directory, or as nobody."""
    context = ssl.create_default_context(cafile=str(home / "keys" / "ca.pem"))
    if name:
        context.load_cert_chain(home / name / "certificate.pem", home / name / "key.pem")
    return context


@contextlib.asynccontextmanager
async def access(config: Path, url: str, admin: str = "admin", metrics: str = "") -> AsyncIterator[Desk]:
    """Have an admin's access to the controller at this address."""
    async with contextlib.AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=admin_context(config.parent, name)))
            )
            for name in (admin, None)
        ]
        yield Desk(url, sessions[0], sessions[1], metrics)


@contextlib.asynccontextmanager
async def desk(config: Path, admin: str = "admin") -> AsyncIterator[Desk]:
    """Run a controller in this process for the length of the block."""
    controller = Controller(load(config))
    async with controller.running():
        url, metrics = f"https://localhost:{controller.port}", f"http://127.0.0.1:{controller.metrics_port}"
        async with access(config, url, admin, metrics) as office:
            yield office


@dataclass
class ControllerProcess:
    """``edgewarden controller run``: one replica, which can be started again after it ended.

    Attributes:
        log: what it has logged since it was started last.
    """

    config: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    _process: asyncio.subprocess.Process | None = None
    _reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it and wait until it serves."""
        self.log.clear()
        self._process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("edgewarden"),
            *("controller", "run", "--config", self.config),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read(self._process))
        async with asyncio.timeout(START_TIMEOUT_S):
            while not self.logged("serving"):
                assert not self._reader.done(), f"the controller did not start: {self.log}"
                await asyncio.sleep(0.02)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.logged('serving')[-1]['port']}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == event]

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end; returns its exit status."""
        assert self._process is not None
        assert self._reader is not None
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await self._reader
            return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, and an end without an error."""
        assert self._process is not None
        self._process.terminate()
        assert await self.wait() == 0, self.log[-20:]

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while line := await process.stderr.readline():
            try:
                self.log.append(json.loads(line))
            except ValueError:  # a traceback
                self.log.append({"event": "text", "text": line.decode()})

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()
            await self.wait()


async def eventually(condition: Any, seconds: float = 30) -> Any:
    """Wait for something that must happen."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):  # noqa: ASYNC110 -- what is waited for happens behind TLS
            await asyncio.sleep(0.05)
    return found
