"""``edgewarden hook``: who is told of what happens.

A secret is never an argument, which every process of the machine could read: it comes out of a file or standard input, or is made by the controller and
printed once.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, BinaryIO
from urllib.parse import quote

import click

from controller.cli.client import Client, admin_option, json_option, show_json

__all__ = ["command"]

MAX_SECRET_FILE_BYTES = 4096
ASK_S = 0.5  # between two looks whether a test has arrived


@click.group()
def command() -> None:
    """Webhooks: receivers that get the fleet's events, signed as Standard Webhooks says."""


@command.command("list")
@admin_option
@json_option
def list_(*, client: Client, as_json: bool) -> None:
    """List webhooks, and what is still owed to each."""
    rows = client.call("GET", "/v1/hooks")
    if as_json:
        show_json(rows)
        return
    for row in rows:
        kinds = ",".join(row["kinds"])
        click.echo(
            f"{row['id']} {_state(row):<9} {row['pending']:>5} waiting {row['given_up']:>5} lost  {kinds}  {row['url']}"
        )
        if row["error"]:
            click.echo(f"  last error: {row['error']}")


@command.command()
@click.argument("url")
@click.option(
    "--kind", "kinds", multiple=True, help="Kind of events, for example node.result; repeatable. Default: all."
)
@click.option(
    "--secret-file",
    type=click.File("rb"),
    help="File with the secret that the receiver has made (whsec_...); - is standard input. Default: the controller makes one.",
)
@admin_option
@json_option
def add(*, url: str, kinds: tuple[str, ...], secret_file: BinaryIO | None, client: Client, as_json: bool) -> None:
    """Send events to URL (https://). The secret that the receiver verifies them with is printed this once."""
    body: dict[str, Any] = {"url": url, "kinds": list(kinds) or ["*"]}
    if secret_file is not None:
        body["secret"] = _read_secret(secret_file)
    made = client.call("POST", "/v1/hooks", json.dumps(body).encode())
    if as_json:
        show_json(made)
    else:
        click.echo(f"webhook {made['id']}" + ("; its secret is shown this once:" if made["secret"] else ""), err=True)
        click.echo(made["secret"] or made["id"])


@command.command()
@click.argument("hook")
@click.option("--deliveries", type=click.IntRange(0, 1000), default=10, show_default=True, help="Deliveries to show.")
@admin_option
@json_option
def show(*, hook: str, deliveries: int, client: Client, as_json: bool) -> None:
    """Show a webhook and what went, or has to go, there; the newest event first."""
    found = client.call("GET", f"/v1/hooks/{quote(hook, safe='')}?limit={deliveries}")
    if as_json:
        show_json(found)
        return
    for fact in ("id", "url", "created", "created_by", "pending", "given_up"):
        click.echo(f"{fact.replace('_', ' '):<12} {found[fact]}")
    click.echo(f"kinds        {', '.join(found['kinds'])}\nstate        {_state(found)}")
    for one in found["deliveries"]:
        click.echo(f"{one['created']}  {one['event']} {one['kind']:<24} {_how(one)}")


@command.command()
@click.argument("hook")
@click.option("--wait", "wait_s", type=click.IntRange(1, 600), default=15, show_default=True, help="Seconds to wait.")
@admin_option
@json_option
def test(*, hook: str, wait_s: int, client: Client, as_json: bool) -> None:
    """Send an event of kind hook.test to this webhook alone; exit code 1 unless it is delivered in time."""
    path = f"/v1/hooks/{quote(hook, safe='')}"
    event = client.call("POST", f"{path}/test")["event"]
    end = time.monotonic() + wait_s
    while True:
        (one,) = client.call("GET", f"{path}?event={event}")["deliveries"]
        if one["state"] != "waiting" or "error" in one or time.monotonic() > end:
            break
        time.sleep(ASK_S)
    if as_json:
        show_json(one)
    else:
        click.echo(f"{event}: {_how(one)}")
    if one["state"] != "delivered":
        sys.exit(1)


@command.command()
@click.argument("hook")
@click.confirmation_option(prompt="What was not delivered yet is dropped. Remove it?")
@admin_option
def remove(*, hook: str, client: Client) -> None:
    """Remove a webhook: nothing is sent there any more."""
    client.call("DELETE", f"/v1/hooks/{quote(hook, safe='')}")
    click.echo(f"{hook}: removed")


def _read_secret(file: BinaryIO) -> str:
    text = file.read(MAX_SECRET_FILE_BYTES + 1)
    if len(text) > MAX_SECRET_FILE_BYTES or not text.strip():
        raise click.BadParameter("this holds no secret", param_hint="--secret-file")
    return text.decode("ascii", "replace").strip()


def _state(row: dict[str, Any]) -> str:
    return "enabled" if row["enabled"] else "disabled"


def _how(one: dict[str, Any]) -> str:
    """Say how a delivery stands."""
    if one["state"] == "delivered":
        return f"delivered {one['delivered']}"
    words = f"{one['state']}, {one['attempts']} attempts"
    if one["state"] == "waiting":
        words += f", next {one['due']}"
    return words + (f": {one['error']}" if "error" in one else "")
