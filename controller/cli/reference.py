"""``edgewarden reference``: what is approved."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from agent.config import load
from agent.errors import HostError
from agent.inference.package import read_package
from agent.inference.signing import TrustStore, verify_package
from agent.policy.bundle import Bundle
from controller.cli.client import Client, admin_option, json_option, show_json

__all__ = ["command"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_VALUE = "[0-9a-f]{64}"
_BOOT_RULE = re.compile(
    rf"(?P<pcr>[0-9]|1[0-9])=(?:(?P<mode>ignored|pinned)|pinned:(?P<pinned>{_VALUE})|(?P<exact>{_VALUE}))"
)
_group_option = click.option("--group", default="default", show_default=True, help="Group of nodes.")
_words_option = click.option("-m", "--message", "words", default="", help="Why; kept with the version.")


@click.group()
def command() -> None:
    """Reference Values: what an approver lets run, versioned for each group."""


@command.command("list")
@_group_option
@admin_option
@json_option
def list_(*, group: str, client: Client, as_json: bool) -> None:
    """List the versions of a group's Reference Values, the newest first, and what is approved now."""
    versions = client.call("GET", f"/v1/groups/{quote(group)}/references")
    values = client.call("GET", f"/v1/groups/{quote(group)}/references/current") if versions else {}
    if as_json:
        show_json({"versions": versions, "current": values})
        return
    for version in versions:
        click.echo(f"{version['version']:>4} {version['created']} {version['created_by']:<20} {version['change']}")
    if values:
        click.echo("")
    for path, digests in sorted(values.get("models", {}).items()):
        click.echo(f"model    {' '.join(digest[:16] for digest in digests)} {path}")
    for path, digests in sorted(values.get("withdrawn", {}).items()):
        click.echo(f"gone     {' '.join(digest[:16] for digest in digests)} {path}")
    for digest in values.get("configs", []):
        click.echo(f"config   {digest}")
    for index, rule in sorted(values.get("boot", {}).items(), key=lambda item: int(item[0])):
        click.echo(" ".join([f"boot     {index} {rule['mode']}", *sorted(rule["values"])]))
    if values:
        click.echo(f"policy   {values['policy']['assigned']}")


@command.command()
@_group_option
@click.option(
    "--config", type=_FILE, help="A node's configuration: its security settings, its PCR, and whose signatures count."
)
@click.option("--policy", type=_FILE, help="Policy bundle that becomes the assigned one.")
@click.option("--package", "packages", type=_FOLDER, multiple=True, help="Signed model package; repeatable.")
@click.option("--trust", type=_FILE, multiple=True, help="Keys or roots that sign packages, if --config is not given.")
@click.option(
    "--boot",
    multiple=True,
    metavar="PCR=ignored|pinned[:VALUE]|VALUE",
    help="Rule for a boot PCR: not looked at; a change since enrolment warns, unless to VALUE; nothing but VALUE. Repeatable, values add up.",
)
@_words_option
@admin_option
@json_option
def approve(
    *,
    group: str,
    config: Path | None,
    policy: Path | None,
    packages: tuple[Path, ...],
    trust: tuple[Path, ...],
    boot: tuple[str, ...],
    words: str,
    client: Client,
    as_json: bool,
) -> None:
    """Approve model packages, a policy bundle, a configuration, boot PCRs: what you hand over is verified and digested here."""
    body: dict[str, Any] = {"words": words}
    keys = [_read(path) for path in trust]
    bundle_keys: list[bytes] = []
    if config is not None:
        settings = load(config)
        body |= {"config": hashlib.sha256(settings.measured()).hexdigest(), "pcr": settings.tpm.pcr}
        if settings.tpm.start_value:
            body["start"] = settings.tpm.start_value
        keys += [_read(Path(path)) for path in (*settings.models.trusted_keys, *settings.models.trusted_roots)]
        if settings.policy.require_signature:
            bundle_keys = [_read(Path(path)) for path in settings.policy.trusted_keys]
    if policy is not None:
        body["policy"] = Bundle.from_bytes(_read(policy), bundle_keys).sha256
    if packages and not keys:
        raise click.UsageError("--package needs --config or --trust: whose signature counts?")
    body["models"] = {path: digest for folder in packages for path, digest in _digests(folder, keys).items()}
    body["boot"] = _boot_rules(boot)
    _show(client.call("POST", f"/v1/groups/{quote(group)}/references", json.dumps(body).encode()), as_json)


@command.command()
@click.argument("kind", type=click.Choice(["model", "policy", "config", "boot"]))
@click.argument("what")
@_group_option
@_words_option
@admin_option
@json_option
def withdraw(*, kind: str, what: str, group: str, words: str, client: Client, as_json: bool) -> None:
    """Withdraw a model (NAME/VERSION), a policy or a configuration (its digest), or a boot PCR's value (PCR=VALUE).

    Where it is in force, the node is contraindicated at its next appraisal; where the boot PCR was pinned, it is a warning.
    """
    body = {"kind": kind, "what": what, "words": words}
    _show(client.call("POST", f"/v1/groups/{quote(group)}/withdrawals", json.dumps(body).encode()), as_json)


def _show(change: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(change)
    else:
        click.echo(f"{change['group']} version {change['version']}: {change['change']}")


def _digests(folder: Path, keys: list[bytes]) -> dict[str, str]:
    package = read_package(folder)
    try:
        verify_package(package, TrustStore.from_pem(*keys))
        manifest = package.manifest()
        return {f"{manifest.name}/{manifest.version}/{path}": digest for path, digest in package.digests().items()}
    finally:
        package.close()


def _boot_rules(texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    rules: dict[str, dict[str, Any]] = {}
    for text in texts:
        match = _BOOT_RULE.fullmatch(text)
        if match is None:
            raise click.BadParameter(
                "PCR=ignored, PCR=pinned, PCR=pinned:<64 hex digits> or PCR=<64 hex digits>", param_hint="--boot"
            )
        index, mode = match["pcr"], match["mode"] or ("pinned" if match["pinned"] else "exact")
        rule = rules.setdefault(index, {"mode": mode, "values": []})
        if rule["mode"] != mode:
            raise click.BadParameter(f"PCR {index} can't be {rule['mode']} and {mode}", param_hint="--boot")
        rule["values"] += [value for value in (match["pinned"], match["exact"]) if value]
    return rules


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
