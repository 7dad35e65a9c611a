"""``edgewarden attest reference``: Reference Values out of what an operator approves: configuration, policy bundle, signed packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from agent.attest.measurement import ZERO_PCR
from agent.attest.reference import Measurement, PolicyReference, ReferenceValues
from agent.config import load
from agent.errors import HostError
from agent.inference.package import read_package
from agent.inference.signing import TrustStore, verify_package
from agent.policy.bundle import Bundle

__all__ = ["command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("reference")
@click.option(
    "--config", type=_FILE, required=True, help="The node's configuration; its security settings are approved."
)
@click.option("--policy", type=_FILE, required=True, help="The assigned policy bundle.")
@click.option("--package", "packages", type=_FOLDER, multiple=True, help="An approved model package; repeatable.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to write; default: standard output."
)
def command(*, config: Path, policy: Path, packages: tuple[Path, ...], out: Path | None) -> None:
    """Write Reference Values; packages must be signed by a key that the configuration trusts."""
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
    values = ReferenceValues(
        measurement=Measurement(settings.tpm.pcr, settings.tpm.start_value or ZERO_PCR.hex()),
        policy=PolicyReference(Bundle.from_bytes(_read(policy), trusted).sha256),
        configs=frozenset({hashlib.sha256(settings.measured()).hexdigest()}),
        models=models,
    )
    if out:
        out.write_bytes(values.encode())
        click.echo(f"{out}: {len(models)} files of {len(packages)} packages")
    else:
        click.echo(values.encode().decode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
