"""``edgewarden policy``: build, sign, check and try bundles; show and change the policy of a running agent."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import structlog

from agent.cli.admin import request
from agent.errors import HostError, PolicyError
from agent.isolation.supervisor import Zygote
from agent.policy.build import build as build_bundle
from agent.policy.build import sign as sign_bundle
from agent.policy.bundle import MAX_BUNDLE_BYTES, Bundle
from agent.policy.client import PolicyClient
from agent.policy.messages import Endpoint
from agent.policy.opa_server import OpaProgram
from agent.policy.pool import PRELOAD, Activation, PolicyPool
from agent.records import PolicyAnswer

__all__ = ["command"]

_PATH = "/admin/v1/policy"
_HTTP_OK = 200
_MAX_INPUT_BYTES = 1 << 20
_T = TypeVar("_T")
_EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_socket_option = click.option(
    "--socket", "socket_path", type=_FILE, default="/run/edgewarden/admin.sock", show_default=True, help="Admin socket."
)
_keys_option = click.option(
    "--key", "keys", type=_EXISTING, multiple=True, help="EC P-256 public key (PEM) that must have signed the bundle."
)
_opa_option = click.option(
    "--opa", type=click.Path(exists=True, dir_okay=False, resolve_path=True), help="Use this OPA binary as the engine."
)
_sandbox_option = click.option(
    "--allow-missing-sandbox", is_flag=True, help="Go on where the kernel has no Landlock or seccomp."
)


@click.group()
def command() -> None:
    """Policy bundles: build, sign, check, try out, activate."""


@command.command()
@click.argument("rego", type=_FOLDER)
@click.argument("policies", type=_FOLDER)
@click.option("-r", "--revision", required=True, help="What the bundle is called.")
@click.option("-o", "--output", type=_FILE, default="bundle.tar.gz", show_default=True)
@_json_option
def build(rego: Path, policies: Path, revision: str, output: Path, as_json: bool) -> None:
    """Make one OPA bundle of the folders REGO and POLICIES; the same sources give the same bytes."""
    bundle = build_bundle(rego, policies, revision)
    _write(output, bundle)
    _show_bundle(bundle, output, as_json)


@command.command()
@click.argument("bundle", type=_EXISTING)
@click.option("--key", "key", type=_EXISTING, required=True, help="EC P-256 private key (PEM).")
@click.option("--key-id", default="", help="Name of the key, for OPA's own verification.")
@click.option("-o", "--output", type=_FILE, help="Where to write it; by default in place.")
@_json_option
def sign(bundle: Path, key: Path, key_id: str, output: Path | None, as_json: bool) -> None:
    """Put OPA's .signatures.json (ES256) into BUNDLE."""
    signed = sign_bundle(_read(bundle, MAX_BUNDLE_BYTES), _read(key, _MAX_INPUT_BYTES), key_id)
    _write(output or bundle, signed)
    _show_bundle(signed, output or bundle, as_json)


@command.command()
@click.argument("bundle", type=_EXISTING)
@_keys_option
@_opa_option
@_sandbox_option
@_json_option
def check(bundle: Path, keys: tuple[Path, ...], opa: str | None, allow_missing_sandbox: bool, as_json: bool) -> None:
    """Do with BUNDLE all that an activation does, trial included, in sandboxed processes."""

    async def work(_pool: PolicyPool, activation: Activation) -> Activation:
        return activation

    activation = _with_pool(bundle, keys, opa, allow_missing_sandbox, work)
    _show({"revision": activation.revision, "sha256": activation.sha256, "ok": True}, as_json)


@command.command(name="eval")
@click.argument("bundle", type=_EXISTING)
@click.option("-i", "--input", "input_file", type=_EXISTING, required=True, help="Input document, JSON.")
@_keys_option
@_opa_option
@_sandbox_option
def evaluate(
    bundle: Path, input_file: Path, keys: tuple[Path, ...], opa: str | None, allow_missing_sandbox: bool
) -> None:
    """Print the decision of BUNDLE on one input document, as the agent would get it."""
    try:
        document = json.loads(_read(input_file, _MAX_INPUT_BYTES))
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--input") from error

    async def work(pool: PolicyPool, _activation: Activation) -> PolicyAnswer:
        attached = asyncio.Event()

        def take(endpoint: Endpoint) -> None:
            client.attach(endpoint)
            attached.set()

        subscription = pool.subscribe(take)
        client = PolicyClient(subscription.overrun)
        await attached.wait()
        answer = await client.decide(document)
        client.close()
        return answer

    answer = _with_pool(bundle, keys, opa, allow_missing_sandbox, work)
    if answer.error is not None:
        raise PolicyError(answer.error)
    click.echo(json.dumps(msgspec.to_builtins(answer.decision), indent=2))


@command.command()
@click.argument("bundle", type=_EXISTING)
@_socket_option
@_json_option
def activate(bundle: Path, socket_path: Path, as_json: bool) -> None:
    """Put BUNDLE in force on the running agent; refused, the old policy stays."""
    _show(_ask(socket_path, "PUT", _read(bundle, MAX_BUNDLE_BYTES)), as_json)


@command.command()
@_socket_option
@_json_option
def show(socket_path: Path, as_json: bool) -> None:
    """Say which policy is in force on the running agent."""
    _show(_ask(socket_path, "GET"), as_json)


def _with_pool(
    bundle: Path,
    keys: tuple[Path, ...],
    opa: str | None,
    allow_missing_sandbox: bool,
    work: Callable[[PolicyPool, Activation], Awaitable[_T]],
) -> _T:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # standard output is the result's
    content = _read(bundle, MAX_BUNDLE_BYTES)
    trusted = [_read(key, _MAX_INPUT_BYTES) for key in keys]
    zygote = Zygote.start(PRELOAD, sandbox_required=not allow_missing_sandbox)

    async def go() -> _T:
        pool = PolicyPool(zygote, trusted_keys=trusted, opa=None if opa is None else OpaProgram(opa))
        try:
            return await work(pool, await pool.start(content))
        finally:
            await pool.close()

    try:
        return asyncio.run(go())
    finally:
        zygote.close()


def _ask(socket_path: Path, method: str, body: bytes | None = None) -> dict[str, Any]:
    status, answer = request(socket_path, method, _PATH, body, "application/gzip")
    if status != _HTTP_OK:
        raise PolicyError(str(answer.get("error", f"the agent answers {status}")))
    return answer


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    if len(content) > max_bytes:
        raise HostError(f"{path}: over {max_bytes} bytes")
    return content


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error


def _show_bundle(content: bytes, path: Path, as_json: bool) -> None:
    bundle = Bundle.from_bytes(content)
    _show({"revision": bundle.revision, "sha256": bundle.sha256, "bytes": len(content), "file": str(path)}, as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo("\n".join(f"{name}: {value}" for name, value in facts.items()))
