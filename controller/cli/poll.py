"""``edgewarden attest poll``: have the controller appraise a node now."""

from __future__ import annotations

import sys
from urllib.parse import quote

import click

from controller.cli.client import Client, admin_option, json_option, show_json
from controller.cli.node import explain

__all__ = ["command"]


@click.command("poll")
@click.argument("node")
@admin_option
@json_option
def command(*, node: str, client: Client, as_json: bool) -> None:
    """Appraise NODE now; exit code 1 unless it is affirming."""
    result = client.call("POST", f"/v1/nodes/{quote(node)}/poll")
    if as_json:
        show_json(result)
    else:
        click.echo(f"{node}: {result['status']}")
        explain(result["checks"])
    if result["status"] != "affirming":
        sys.exit(1)
