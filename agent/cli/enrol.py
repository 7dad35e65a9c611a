"""``edgewarden attest enrol|status|leave``: a running node and its controller, and a way out for one that does not run.

The join token comes from a file or from standard input, never as an argument: every user of the machine can read arguments.
What a controller said is shown without what could move a terminal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import click

from agent.cli import admin
from agent.config import DEFAULT_CONFIG, load
from agent.errors import HostError, PolicyError, VerificationError

__all__ = ["enrol", "leave", "status"]

MAX_TOKEN_FILE_BYTES = 4096
_ENROL_TIMEOUT_S = 600.0  # a discrete TPM makes several keys
_HTTP_OK = 200
_HTTP_DENIED = 403
_HTTP_REFUSED = frozenset({409, 422})

_socket_option = click.option(
    "--socket",
    "socket_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default="/run/edgewarden/admin.sock",
    show_default=True,
    help="Admin socket.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@click.option(
    "--token-file", type=click.File("rb"), required=True, help="File with the join token; - is standard input."
)
@click.option(
    "--mode",
    type=click.Choice(["pull", "push"]),
    help="Who begins an appraisal. Default: pull, where the control listener has an address that is known.",
)
@click.option("--address", metavar="HOST:PORT", help="Where the controller reaches the control listener.")
@_socket_option
@_json_option
def enrol(token_file: BinaryIO, mode: str | None, address: str | None, socket_path: Path, as_json: bool) -> None:
    """Enrol the running node at the controller that made the join token."""
    token = token_file.read(MAX_TOKEN_FILE_BYTES + 1)
    if len(token) > MAX_TOKEN_FILE_BYTES or not token.strip():
        raise click.BadParameter("this holds no join token", param_hint="--token-file")
    order = {"token": token.decode("ascii", "replace").strip(), "mode": mode, "address": address}
    _show(_ask(socket_path, "POST", "/admin/v1/enrol", json.dumps(order).encode(), _ENROL_TIMEOUT_S), as_json)


@click.command()
@_socket_option
@_json_option
def status(socket_path: Path, as_json: bool) -> None:
    """Say where the running node is enrolled, and what its controller thinks of it."""
    _show(_ask(socket_path, "GET", "/admin/v1/enrolment"), as_json)


@click.command()
@_socket_option
@click.option("--offline", is_flag=True, help="No agent runs, or none can: work on its files, as root.")
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="With --offline: the node's configuration.",
)
@_json_option
def leave(socket_path: Path, config: Path, *, offline: bool, as_json: bool) -> None:
    """Let the node forget its controller; release it there as well.

    With --offline also the measurement logs of a TPM that was cleared are put aside, so that the agent can start again.
    """
    if not offline:
        _show(_ask(socket_path, "DELETE", "/admin/v1/enrolment"), as_json)
        return
    from agent.daemon.offline import leave_offline  # noqa: PLC0415 -- what talks to a running node needs no TPM library

    settings = load(config)
    left = leave_offline(settings)
    retired = [str(folder) for folder in left.retired]
    if as_json:
        answer = {"enrolled": False, "left": left.enrolled, "controller": left.controller, "retired": retired}
        click.echo(json.dumps(answer, indent=2))
        return
    if left.enrolled:
        click.echo(f"left         {left.controller or 'a controller whose address could not be read'}")
    for folder in retired:
        click.echo(f"put aside    the measurement logs in {folder}: the TPM was cleared")
    click.echo(f"next         edgewarden node release {settings.node.id} at the controller; start the agent; enrol")


def _ask(
    socket_path: Path, method: str, path: str, body: bytes | None = None, timeout_s: float = admin.TIMEOUT_S
) -> dict[str, Any]:
    code, answer = admin.request(socket_path, method, path, body, "application/json", timeout_s=timeout_s)
    if code == _HTTP_OK:
        return answer
    words = _printable(answer.get("error", "no reason given"))
    if code == _HTTP_DENIED:
        raise PolicyError(words)
    if code in _HTTP_REFUSED:
        raise VerificationError("enrolment", words)
    raise HostError(f"the agent answered {code}: {words}")


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    names = {
        "enrolled": answer["enrolled"] and answer["controller"],
        "mode": " ".join(filter(None, (answer.get("mode"), answer.get("address")))),
        "since": answer.get("since"),
        "certificate": answer.get("certificate_until"),
        "connected": answer["why"],
        "trust": answer["trust"],
        "result": _result(answer),
        "last push": answer.get("push_failure"),
    }
    for name, value in names.items():
        if value is False:
            click.echo(f"{name:<12} no")
        elif value:
            click.echo(f"{name:<12} {_printable(value)}")
    for check in answer.get("checks", []):
        click.echo(_printable(f"  {check['name']:<17} {check['outcome']:<8} {check['words']}").rstrip())


def _printable(text: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(text))


def _result(answer: dict[str, Any]) -> str:
    if "issued_at" not in answer:
        return ""
    withdrawn = f", {answer['withdrawn']} files withdrawn" if answer["withdrawn"] else ""
    return f"{answer['issued_at']} ({answer['age_s']} s ago{withdrawn})"
