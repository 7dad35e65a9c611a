"""``edgewarden attest reference`` and ``keylime-policy``: what an operator approves, for a Verifier.

Configuration, policy bundle and signed packages become Reference Values, or a runtime policy of Keylime's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import click

from agent.attest.keylime import runtime_policy
from agent.attest.measurement import BOOT_AGGREGATE, ZERO_PCR, config_entry, model_entry, policy_entry, unload_entry
from agent.attest.reference import Measurement, PolicyReference, ReferenceValues
from agent.config import load
from agent.errors import HostError
from agent.inference.package import read_package
from agent.inference.signing import TrustStore, verify_package
from agent.policy.bundle import Bundle

__all__ = ["command", "keylime_policy"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


_HEX_DIGITS = 64


def _inputs(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that name what is approved."""
    for option in (
        click.option(
            "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write; default: standard output."
        ),
        click.option(
            "--package", "packages", type=_FOLDER, multiple=True, help="An approved model package; repeatable."
        ),
        click.option("--policy", type=_FILE, required=True, help="The assigned policy bundle."),
        click.option(
            "--config", type=_FILE, required=True, help="The node's configuration; its security settings are approved."
        ),
    ):
        function = option(function)
    return function


@click.command("reference")
@_inputs
def command(*, config: Path, policy: Path, packages: tuple[Path, ...], out: Path | None) -> None:
    """Write Reference Values; packages must be signed by a key that the configuration trusts."""
    values, _ = _approved(config, policy, packages)
    _write(out, values.encode().decode(), f"{len(values.models)} files of {len(packages)} packages")


@click.command("keylime-policy")
@_inputs
@click.option(
    "--boot-aggregate",
    "boot_aggregates",
    metavar="HEX",
    multiple=True,
    help="An approved SHA-256 boot_aggregate; repeatable. Default: not checked.",
)
def keylime_policy(
    *, config: Path, policy: Path, packages: tuple[Path, ...], out: Path | None, boot_aggregates: tuple[str, ...]
) -> None:
    """Write a runtime policy for Keylime; packages must be signed by a key that the configuration trusts.

    A refused file was never loaded, and is not checked; whatever else is not listed fails the node.
    """
    for digest in boot_aggregates:
        if len(digest) != _HEX_DIGITS or not all(digit in "0123456789abcdef" for digit in digest):
            raise click.UsageError(f"--boot-aggregate: {digest!r} is not {_HEX_DIGITS} lower-case hexadecimal digits")
    values, revision = _approved(config, policy, packages)
    (settings,) = values.configs
    bundle = values.policy.assigned
    entries = [config_entry(bytes.fromhex(settings)), policy_entry(revision, bytes.fromhex(bundle))]
    for key, digests in values.models.items():
        name, version, file = key.split("/", 2)
        entries += [model_entry(name, version, file, bytes.fromhex(digest)) for digest in digests]
        entries.append(unload_entry(name, version))
    approved = {entry.path: frozenset({entry.digest.hex()}) for entry in entries}
    excludes = ["^edgewarden/refused/"]
    if boot_aggregates:
        approved[BOOT_AGGREGATE] = frozenset(boot_aggregates)
    else:
        excludes.append(f"^{BOOT_AGGREGATE}$")
    document = json.dumps(runtime_policy(approved, tuple(excludes)), indent=2)
    _write(out, document, f"{len(values.models)} files of {len(packages)} packages")


def _approved(config: Path, policy: Path, packages: tuple[Path, ...]) -> tuple[ReferenceValues, str]:
    """Return the Reference Values and the policy's revision."""
    settings = load(config)
    paths = [*settings.models.trusted_keys, *settings.models.trusted_roots]
    trust = TrustStore.from_pem(*(_read(Path(path)) for path in paths))
    models: dict[str, frozenset[str]] = {}
    for directory in packages:
        package = read_package(directory)
        try:
            verify_package(package, trust)
            manifest = package.manifest()
            for path, digest in package.digests().items():
                models[f"{manifest.name}/{manifest.version}/{path}"] = frozenset({digest})
        finally:
            package.close()
    trusted = [_read(Path(path)) for path in settings.policy.trusted_keys] if settings.policy.require_signature else []
    bundle = Bundle.from_bytes(_read(policy), trusted)
    values = ReferenceValues(
        measurement=Measurement(settings.tpm.pcr, settings.tpm.start_value or ZERO_PCR.hex()),
        policy=PolicyReference(bundle.sha256),
        configs=frozenset({hashlib.sha256(settings.measured()).hexdigest()}),
        models=models,
    )
    return values, bundle.revision


def _write(out: Path | None, text: str, words: str) -> None:
    if out is None:
        click.echo(text)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise HostError(f"{out}: {error.strerror}") from error
    click.echo(f"{out}: {words}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
