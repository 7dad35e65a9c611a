"""``edgewarden model``: sign, verify, install, list and remove model packages."""

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml
from cryptography import x509

from agent.errors import ConfigError, HostError, VerificationError
from agent.inference import store as model_store
from agent.inference.inspection import inspect as inspect_package
from agent.inference.package import SIGNATURE_FILE, read_package
from agent.inference.signing import Signer, TrustStore, load_signing_key, sign, verify_package
from agent.isolation.supervisor import Zygote
from agent.records import TensorSpec

__all__ = ["command"]

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_STORE = click.Path(file_okay=False, path_type=Path)

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_store = click.option("--store", required=True, type=_STORE, help="The node's model directory.")
_trust = click.option(
    "--trust",
    "trusted",
    required=True,
    multiple=True,
    type=_FILE,
    help="PEM: an EC P-256 public key, or trusted certificates. Repeat for more.",
)


@click.group("model")
def command() -> None:
    """Sign, verify, install, list and remove model packages."""


def _print(as_json: bool, facts: dict[str, Any], text: str) -> None:
    click.echo(json.dumps(facts) if as_json else text)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error


def _signer_facts(signer: Signer) -> dict[str, Any]:
    return {
        "kind": signer.kind,
        "spki_sha256": signer.sha256_of_spki,
        "subject": signer.subject,
        "in_date": signer.in_date,
    }


def _signer_text(signer: Signer) -> str:
    dates = "" if signer.in_date else " (its certificate is not in date now)"
    return f"{signer.subject or signer.kind} {signer.sha256_of_spki}{dates}"


@command.command("sign")
@click.argument("directory", type=_DIRECTORY)
@click.option("--key", required=True, type=_FILE, help="PEM: EC P-256 private key; asks for a password if it has one.")
@click.option("--cert", "chain", type=_FILE, help="PEM: the key's certificate first, then intermediates.")
@_json
def _sign(*, directory: Path, key: Path, chain: Path | None, as_json: bool) -> None:
    """Sign the package in DIRECTORY: writes DIRECTORY/model.sig (OpenSSF Model Signing)."""
    pem = _read(key)
    password = None
    if b"ENCRYPTED" in pem:
        password = click.prompt(f"Password of {key}", hide_input=True, err=True).encode()
    private = load_signing_key(pem, password)
    certificates: list[x509.Certificate] = []
    if chain is not None:
        try:
            certificates = x509.load_pem_x509_certificates(_read(chain))
        except ValueError as error:
            raise ConfigError(f"--cert {chain}: no PEM certificates ({error})") from error
    package = read_package(directory)
    try:
        manifest = package.manifest()
        bundle = sign(manifest.name, package.digests(), private, certificates)
    finally:
        package.close()
    target = directory / SIGNATURE_FILE
    _write_atomically(target, bundle)
    facts = {"signature": str(target), "sha256": package.sha256, "files": len(package.files)}
    _print(as_json, facts, f"signed {len(package.files)} files, digest {package.sha256}: {target}")


def _write_atomically(target: Path, data: bytes) -> None:
    try:
        fd, fresh = tempfile.mkstemp(dir=target.parent, prefix=".signature-")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        Path(fresh).replace(target)
    except OSError as error:
        raise HostError(f"{target}: {error.strerror}") from error


@command.command("verify")
@click.argument("directory", type=_DIRECTORY)
@_trust
@click.option("--inspect", is_flag=True, help="Also run the structural gate and a trial session, in a sandbox.")
@_json
def _verify(*, directory: Path, trusted: tuple[Path, ...], inspect: bool, as_json: bool) -> None:
    """Verify the package in DIRECTORY: its signature, that every file is listed, its manifest."""
    trust = TrustStore.from_pem(*map(_read, trusted))
    # The zygote first: it must be started before anything that a child should not inherit is open.
    zygote = Zygote.start(["agent.inference.inspector"]) if inspect else None
    package = read_package(directory)
    try:
        signer = verify_package(package, trust)
        manifest = package.manifest()
        report = asyncio.run(inspect_package(zygote, package)) if zygote else None
    finally:
        package.close()
        if zygote:
            zygote.close()
    facts = {
        "name": manifest.name,
        "version": manifest.version,
        "sha256": package.sha256,
        "signer": _signer_facts(signer),
        "inspection": msgspec.to_builtins(report),
    }
    text = f"{manifest.name} {manifest.version} holds: digest {package.sha256}, signed by {_signer_text(signer)}"
    if report is not None:
        text += f"\ninspected: {report.gate.nodes} nodes, {report.gate.parameters} parameters, loads and runs"
    _print(as_json, facts, text)


@command.command("install")
@click.argument("directory", type=_DIRECTORY)
@_store
@_trust
@click.option("--replace", is_flag=True, help="Replace another content of the same version.")
@click.option("--allow-expired", is_flag=True, help="Accept certificates that were in date once.")
@_json
def _install(
    *, directory: Path, store: Path, trusted: tuple[Path, ...], replace: bool, allow_expired: bool, as_json: bool
) -> None:
    """Verify the package in DIRECTORY and put it into the store in one step."""
    trust = TrustStore.from_pem(*map(_read, trusted))
    done = model_store.install(directory, store, trust, replace=replace, allow_expired=allow_expired)
    facts = {
        "name": done.manifest.name,
        "version": done.manifest.version,
        "sha256": done.sha256,
        "signer": _signer_facts(done.signer),
        "path": str(done.path),
        "changed": done.changed,
    }
    verb = "installed" if done.changed else "was installed already:"
    _print(as_json, facts, f"{verb} {done.path}, digest {done.sha256}, signed by {_signer_text(done.signer)}")


@command.command("list")
@_store
@_json
def _list(*, store: Path, as_json: bool) -> None:
    """List the store; says nothing about signatures (see verify)."""
    models = model_store.list_models(store)
    facts = [
        {"name": model.name, "version": model.version, "bytes": model.size_bytes, "path": str(model.path)}
        for model in models
    ]
    lines = [f"{model.name}\t{model.version}\t{model.size_bytes}" for model in models]
    _print(as_json, {"models": facts}, "\n".join(["NAME\tVERSION\tBYTES", *lines]))


@command.command("remove")
@click.argument("name")
@click.argument("version")
@_store
@_json
def _remove(*, name: str, version: str, store: Path, as_json: bool) -> None:
    """Take NAME VERSION out of the store."""
    model_store.remove(store, name, version)
    _print(as_json, {"name": name, "version": version}, f"removed {name} {version}")


@command.command("manifest")
@click.argument("onnx", type=_FILE)
@click.option("--name", required=True)
@click.option("--version", required=True)
def _manifest(*, onnx: Path, name: str, version: str) -> None:
    """Print a first model.yaml for the graph in ONNX; read it through before you sign."""
    from agent.inference.gate import graph_specs, parse_model  # noqa: PLC0415 -- the other verbs need no graph parser
    from agent.inference.manifest import parse_manifest  # noqa: PLC0415 -- as above

    inputs, outputs = graph_specs(parse_model(_read(onnx)))
    document = {
        "name": name,
        "version": version,
        "inputs": [msgspec.to_builtins(spec) for spec in inputs],
        "outputs": [msgspec.to_builtins(spec) for spec in outputs],
        "modality": _guess_modality(inputs),
        "sensitivity": "internal",
    }
    text = yaml.safe_dump(document, sort_keys=False, default_flow_style=None)
    try:
        parse_manifest(text.encode())
    except VerificationError as error:
        raise ConfigError(f"the graph needs a manifest written by hand: {error.message}") from error
    click.echo("# Made from the graph. Check: modality (pixels or plain numbers? value range?), sensitivity.")
    click.echo(text, nl=False)


def _guess_modality(inputs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """Take a lone float input with four dimensions of which one is 1 or 3 channels for an image."""
    if len(inputs) == 1 and inputs[0].datatype.startswith("FP"):
        for layout in ("NCHW", "NHWC"):
            axes = dict(zip(layout, inputs[0].shape, strict=False))
            if len(inputs[0].shape) == len(layout) and axes["C"] in {1, 3} and min(axes["H"], axes["W"]) > 0:
                color = "RGB" if axes["C"] == 3 else "GRAY"  # noqa: PLR2004 -- channels of RGB
                return {"kind": "image", "input": inputs[0].name, "layout": layout, "color": color}
    return {"kind": "tensor"}
