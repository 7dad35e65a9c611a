"""``edgewarden node``: the fleet."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table

from controller.cli.client import Client, admin_option, json_option, show_json

__all__ = ["command", "explain"]

WATCH_S = 2.0
_STYLES = {"affirming": "green", "warning": "yellow", "contraindicated": "red", "none": "dim"}
_HINTS = {
    "models": "unload it on the node, or approve it: edgewarden reference approve",
    "refused": "install the package again on the node: edgewarden model install",
    "config": "approve the configuration, or put the approved one back: edgewarden reference approve --config",
    "policy": "activate the assigned bundle on the node, or approve the one in force",
    "boot-pcrs": "look into the change of firmware or kernel, then approve it: edgewarden reference approve --boot PCR=pinned:VALUE",
    "boot-aggregate": "reboot the node; if it stays, firmware changes PCRs after the agent has started",
    "clock": "wait some minutes; if the TPM was cleared: edgewarden node release, then enrol again",
    "log-replay": "the log does not fit the TPM: look into the node, then reboot it",
    "spki": "another machine answers at this address, or the key was lost: edgewarden node release, then enrol again",
    "signer": "another TPM answers: edgewarden node release, then enrol again",
}


@click.group()
def command() -> None:
    """Nodes: their trust, and whether they answer."""


def _pages(client: Client, group: str | None) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = []
    after = ""
    while True:
        query = f"/v1/nodes?limit=1000&after={quote(after)}" + (f"&group={quote(group)}" if group else "")
        page = client.call("GET", query)
        nodes += page["nodes"]
        after = page["next"]
        if not after:
            return nodes


@command.command("list")
@click.option("--group", help="Only nodes of this group.")
@click.option("--status", type=click.Choice(list(_STYLES)), help="Only nodes with this result.")
@admin_option
@json_option
def list_(*, group: str | None, status: str | None, client: Client, as_json: bool) -> None:
    """List nodes with their last Attestation Result."""
    nodes = [node for node in _pages(client, group) if status in {None, node["status"]}]
    if as_json:
        show_json(nodes)
    else:
        Console().print(_table(nodes))


def _table(nodes: list[dict[str, Any]]) -> Table:
    table = Table("node", "group", "result", "since", "answers", "why", box=None)
    for node in nodes:
        style = _STYLES[node["status"]]
        checks = node.get("checks", [])
        why = checks[0]["name"] if checks else ""
        answers = "yes" if node["reachable"] else f"no: {node.get('error', '')}"
        table.add_row(
            node["id"], node["group"], f"[{style}]{node['status']}[/]", node.get("since", ""), answers[:60], why
        )
    return table


@command.command()
@click.argument("name")
@click.option("--history", type=click.IntRange(0, 1000), default=5, show_default=True, help="Results to show.")
@admin_option
@json_option
def show(*, name: str, history: int, client: Client, as_json: bool) -> None:
    """Show a node: what is thought of it and why, whether it answers, and its history."""
    node = client.call("GET", f"/v1/nodes/{quote(name)}")
    results = client.call("GET", f"/v1/nodes/{quote(name)}/results?limit={history}")
    if as_json:
        show_json({**node, "results": results})
        return
    facts = ("id", "group", "mode", "address", "status", "since", "appraised", "reachable", "contact", "error")
    for fact in (*facts, "due", "enrolled", "certificate_until", "reference_version", "log_entries"):
        if node.get(fact) not in {None, ""}:
            click.echo(f"{fact.replace('_', ' '):<18} {node[fact]}")
    for label, value in node["labels"].items():
        click.echo(f"label              {label}={value}")
    explain(node.get("checks", []))
    for result in results:
        click.echo(f"{result['at']}  {result['status']:<16} {', '.join(check['name'] for check in result['checks'])}")


def explain(checks: list[dict[str, str]]) -> None:
    """Print each check that does not hold, with what to do about it."""
    for check in checks:
        click.echo(f"\n{check['name']}: {check['outcome']}: {check.get('words', '')}")
        if check["name"] in _HINTS:
            click.echo(f"  do: {_HINTS[check['name']]}")


@command.command()
@click.option("--group", help="Only nodes of this group.")
@admin_option
@json_option
def watch(*, group: str | None, client: Client, as_json: bool) -> None:
    """Print each change of a node's result or reachability as it comes; Ctrl-C ends it."""
    known: dict[str, tuple[str, bool, str]] = {}
    while True:
        for node in _pages(client, group):
            checks = ", ".join(check["name"] for check in node.get("checks", []))
            now = (node["status"], node["reachable"], checks)
            if known.get(node["id"]) != now:
                known[node["id"]] = now
                if as_json:
                    show_json(node)
                else:
                    answers = "" if node["reachable"] else "  does not answer"
                    click.echo(
                        f"{node['appraised'] or '-':<21} {node['id']:<24} {node['status']:<16} {checks}{answers}"
                    )
        time.sleep(WATCH_S)


@command.command()
@click.argument("name")
@click.confirmation_option(prompt="The node must enrol again with a new join token. Release it?")
@admin_option
def release(*, name: str, client: Client) -> None:
    """Release a node: its name and its TPM can be enrolled again."""
    client.call("DELETE", f"/v1/nodes/{quote(name)}")
    click.echo(f"{name}: released")


@command.command()
@click.argument("name")
@click.argument("seconds", metavar="SECONDS|group")
@click.option(
    "--group", "is_group", is_flag=True, help="NAME is a group: all its nodes that have no interval of their own."
)
@admin_option
def interval(*, name: str, seconds: str, is_group: bool, client: Client) -> None:
    """Say how often a node, or a group's nodes, are polled: every SECONDS, or as often as the node's `group`."""
    if not seconds.isdecimal() and (is_group or seconds != "group"):
        raise click.BadParameter(f"{seconds!r} is not a number of seconds" + ("" if is_group else ", nor `group`"))
    wanted = int(seconds) if seconds.isdecimal() else None
    kind = "groups" if is_group else "nodes"
    client.call("PUT", f"/v1/{kind}/{quote(name)}/interval", json.dumps({"interval_s": wanted}).encode())
    click.echo(f"{name}: polled " + ("as often as its group" if wanted is None else f"every {wanted} s"))
