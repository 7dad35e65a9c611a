"""A controller for tests: real TLS, a real database, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from click.testing import CliRunner

from agent.attest.enrolment import JoinToken
from controller.cli.service import command
from controller.service import Controller
from controller.settings import load
from tests.support.attest import CONFIG, MODEL, PCR, POLICY

__all__ = ["APPROVAL", "Desk", "controller_home", "desk", "eventually"]

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


def _context(home: Path, name: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(home / "keys" / "ca.pem"))
    if name:
        context.load_cert_chain(home / name / "certificate.pem", home / name / "key.pem")
    return context


@contextlib.asynccontextmanager
async def desk(config: Path, admin: str = "admin") -> AsyncIterator[Desk]:
    """Run a controller for the length of the block."""
    controller = Controller(load(config))
    home = config.parent
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(controller.running())
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=_context(home, name)))
            )
            for name in (admin, None)
        ]
        office = Desk(f"https://localhost:{controller.port}", sessions[0], sessions[1])
        office.metrics = f"http://127.0.0.1:{controller.metrics_port}"
        yield office


async def eventually(condition: Any, seconds: float = 30) -> Any:
    """Wait for something that must happen."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):  # noqa: ASYNC110 -- what is waited for happens behind TLS
            await asyncio.sleep(0.05)
    return found
