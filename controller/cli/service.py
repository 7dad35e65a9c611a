"""``edgewarden controller``: make a controller and run it."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import click
import structlog
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent import clock
from agent.config import read_environment
from agent.errors import ConfigError, EdgeWardenError
from agent.host.notify import Notifier
from controller.cli.client import write_admin
from controller.cli.status import command as status
from controller.settings import DEFAULT_CONFIG, Settings, json_schema, load

__all__ = ["command"]

FIRST_ADMIN_S = 90 * 86_400
_CONFIG = click.Path(path_type=Path, dir_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True)


@click.group()
def command() -> None:
    """Make and run the controller: it enrols nodes, appraises their Evidence and tells their trust."""


command.add_command(status)


@command.command()
@click.option("--config", "-c", type=_CONFIG, default=DEFAULT_CONFIG, show_default=True)
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the settings, and end.")
@click.option("--check", is_flag=True, help="Read the settings, say whether they are valid, and end.")
def run(*, config: Path, schema: bool, check: bool) -> None:
    """Run one replica until SIGTERM; logs are JSON lines on standard error."""
    if schema:
        click.echo(json.dumps(json_schema(), indent=2))
        return
    settings = load(config)
    if check:
        click.echo(f"{config}: valid")
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    from controller import service  # noqa: PLC0415 -- the other verbs need no server

    environment = read_environment()
    watchdog_s = environment.watchdog_usec / 1e6 if environment.watchdog_usec else None
    service.run(settings, Notifier(environment.notify_socket), watchdog_s)


@command.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--url", required=True, help="How nodes and operators reach it: https://NAME:PORT.")
@click.option("--listen", default="127.0.0.1:8445", show_default=True, help="ADDRESS:PORT to listen on.")
@click.option("--name", "names", multiple=True, help="More DNS names or addresses for the certificate; repeatable.")
@click.option("--trust-domain", default="edgewarden.internal", show_default=True, help="Of the SPIFFE IDs.")
@click.option("--database", help="postgresql+asyncpg://USER@HOST/NAME for several replicas; default: an SQLite file.")
@click.option(
    "--database-password-file", type=_FILE, help="File that holds PostgreSQL's password, where that asks for one."
)
@click.option("--database-ca", type=_FILE, help="PEM file of the CAs that PostgreSQL's certificate is verified with.")
@click.option("--metrics", help="Loopback ADDRESS:PORT for health and metrics; default: none.")
@click.option("--admin", "admin", default="root", show_default=True, help="Name of the first admin, an approver.")
def init(
    *,
    directory: Path,
    url: str,
    listen: str,
    names: tuple[str, ...],
    trust_domain: str,
    database: str | None,
    database_password_file: Path | None,
    database_ca: Path | None,
    metrics: str | None,
    admin: str,
) -> None:
    """Make DIRECTORY: settings, keys, the database's tables, and the first admin's access in DIRECTORY/admin."""
    from urllib.parse import urlsplit  # noqa: PLC0415 -- as below

    from controller.trust.authority import Authority  # noqa: PLC0415 -- only this verb makes keys

    host = urlsplit(url).hostname
    if not url.startswith("https://") or host is None:
        raise click.BadParameter("it begins with https:// and names a host", param_hint="--url")
    path = directory / "controller.yaml"
    if path.exists():
        raise ConfigError(f"{path}: there is a controller already")
    document: dict[str, Any] = {"listen": listen, "url": url, "trust_domain": trust_domain, "keys": "keys"}
    store = {"url": database, "password_file": database_password_file, "ca": database_ca}
    if any(store.values()):
        document["database"] = {name: str(value) for name, value in store.items() if value}
    if metrics:
        document["metrics"] = {"listen": metrics}
    settings = _write_settings(path, document)
    try:
        asyncio.run(_migrate(settings))  # what the database has against it shows before there are keys
        authority = Authority.create(directory / "keys", trust_domain, [host, *names])
    except EdgeWardenError:
        path.unlink()  # so that it can be tried again
        raise
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.issue(f"admin/{admin}", admin, key.public_key(), FIRST_ADMIN_S)
    asyncio.run(_first_admin(settings, admin, issued.spki_sha256, issued.until_us))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_admin(directory / "admin", url=url, ca=authority.ca_pem, certificate=issued.pem, key=pem)
    click.echo(f"settings  {path}\nadmin     {directory / 'admin'} ({admin}, approver; give it to --admin)")
    click.echo(f"start     edgewarden controller run --config {path}")


def _write_settings(path: Path, document: dict[str, Any]) -> Settings:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(document, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        return load(path)
    except ConfigError:
        path.unlink()
        raise


@command.command()
@click.option("--config", "-c", type=_CONFIG, default=DEFAULT_CONFIG, show_default=True)
def migrate(*, config: Path) -> None:
    """Bring the database's tables to this version, and end: for a role that may, where the running controller's may not."""
    asyncio.run(_migrate(load(config)))
    click.echo("the tables are those of this version")


async def _migrate(settings: Settings) -> None:
    from controller.store.database import Database  # noqa: PLC0415 -- only this verb and `init` write without the service

    await (await Database.open(settings.database)).close()


async def _first_admin(settings: Settings, name: str, spki_sha256: str, until_us: int) -> None:
    from controller.store import admins, audit  # noqa: PLC0415 -- only this verb writes without the service
    from controller.store.database import Database  # noqa: PLC0415 -- as above

    database = await Database.open(settings.database)
    try:
        async with database.begin() as connection:
            now_us = clock.now_us()
            await admins.add(connection, name, "approver", spki_sha256, expires_us=until_us, by="init", now_us=now_us)
            entry = audit.AuditEntry(kind="admin.create", principal="init", detail={"name": name, "role": "approver"})
            await audit.append(connection, entry)
    finally:
        await database.close()
