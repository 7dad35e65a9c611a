"""``edgewarden token``: join tokens."""

from __future__ import annotations

import json
from urllib.parse import quote

import click

from controller.cli.client import Client, admin_option, json_option, show_json

__all__ = ["command"]


@click.group()
def command() -> None:
    """Join tokens: each lets one node enrol, once."""


@command.command()
@click.option("--group", default="default", show_default=True, help="Group of the node.")
@click.option("--node", help="The only node that may use it.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Label of the node; repeatable.")
@click.option(
    "--valid", "valid_s", type=click.IntRange(60, 2_592_000), default=86_400, show_default=True, help="Seconds."
)
@admin_option
@json_option
def create(
    *, group: str, node: str | None, labels: tuple[str, ...], valid_s: int, client: Client, as_json: bool
) -> None:
    """Print a new join token; it is shown this once. Give it to `edgewarden attest enrol` on the node."""
    pairs = [label.partition("=") for label in labels]
    if not all(separator for _, separator, _ in pairs):
        raise click.BadParameter("NAME=VALUE", param_hint="--label")
    body = {"group": group, "labels": {name: value for name, _, value in pairs}, "valid_s": valid_s}
    if node:
        body["node"] = node
    answer = client.call("POST", "/v1/tokens", json.dumps(body).encode())
    if as_json:
        show_json(answer)
    else:
        click.echo(f"for group {answer['group']}, until {answer['expires']}; it is used once", err=True)
        click.echo(answer["token"])


@command.command("list")
@admin_option
@json_option
def list_(*, client: Client, as_json: bool) -> None:
    """List join tokens, without their secrets."""
    rows = client.call("GET", "/v1/tokens")
    if as_json:
        show_json(rows)
        return
    for row in rows:
        state = f"used by {row['used_by']} at {row['used']}" if row["used"] else f"until {row['expires']}"
        click.echo(f"{row['id']} {row['group_name']:<16} {row['node'] or '-':<24} {state}")


@command.command()
@click.argument("token")
@admin_option
def revoke(*, token: str, client: Client) -> None:
    """End a join token that was not used yet; TOKEN is its id, as `edgewarden token list` shows it."""
    client.call("DELETE", f"/v1/tokens/{quote(token)}")
    click.echo(f"{token}: revoked")
