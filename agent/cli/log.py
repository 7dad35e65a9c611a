"""``edgewarden log``: verify the audit log, show its newest records. Works beside a running agent and on a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.audit.reader import LogReport, tail, verify_log
from agent.errors import VerificationError

__all__ = ["command"]

DEFAULT_DIRECTORY = Path("/var/lib/edgewarden/audit")
_directory = click.Path(path_type=Path, file_okay=False)


@click.group("log")
def command() -> None:
    """Verify and read the audit log."""


@command.command()
@click.argument("directory", type=_directory, required=False)
@click.option("--dir", "option", type=_directory, help=f"The log's directory [default: {DEFAULT_DIRECTORY}].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(directory: Path | None, option: Path | None, as_json: bool) -> None:
    """Verify every record, the tree over them and that nothing is missing.

    Exit code 1 when it does not verify; the first bad place is named first.
    """
    directory = _one(directory, option)
    report = verify_log(directory)
    if as_json:
        click.echo(msgspec.json.encode({"ok": report.ok, **msgspec.to_builtins(report)}).decode())
    else:
        for line in _summary(directory, report):
            click.echo(line)
    if not report.ok:
        first = report.findings[0]
        raise VerificationError(first.check, f"the log does not verify: {first.place}: {first.text}")


def _one(argument: Path | None, option: Path | None) -> Path:
    if argument is not None and option is not None:
        raise click.UsageError("give the directory once, as DIRECTORY or as --dir")
    return argument or option or DEFAULT_DIRECTORY


def _summary(directory: Path, report: LogReport) -> list[str]:
    kept = f"records {report.first} to {report.size - 1}" if report.size > report.first else "no records"
    lines = [
        f"log       {directory}{'  (in use by an agent)' if report.in_use else ''}",
        f"kept      {kept}, {report.segments} segment{'s' * (report.segments != 1)}",
        f"tree      size {report.size}, root {report.root}",
        *(f"gap       records {first} to {last} were removed to stay within the budget" for first, last in report.gaps),
        *(f"FINDING   {finding}" for finding in report.findings),
    ]
    return [*lines, f"result    {'verified' if report.ok else 'NOT VERIFIED'}"]


@command.command("tail")
@click.argument("directory", type=_directory, required=False)
@click.option("--dir", "option", type=_directory, help=f"The log's directory [default: {DEFAULT_DIRECTORY}].")
@click.option("-n", "count", type=click.IntRange(0, 1_000_000), default=10, show_default=True, help="Records to show.")
@click.option("-f", "follow", is_flag=True, help="Go on with each new record.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as they are stored, one a line.")
def show_tail(directory: Path | None, option: Path | None, count: int, follow: bool, as_json: bool) -> None:
    """Show the newest records."""
    for record in tail(_one(directory, option), count, follow=follow):
        click.echo(record if as_json else _readable(record))


class _Shown(msgspec.Struct, frozen=True):
    """What a line shows of a record; the rest is left to ``--json``."""

    seq: int
    time: str
    kind: str
    outcome: str
    principal: str = ""
    model: str = ""
    version: str = ""
    decision_id: str = ""
    reasons: tuple[str, ...] = ()
    error: str = ""
    detail: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(_Shown)


def _readable(record: bytes) -> str:
    """Show a record in one line; text from clients is quoted, so that it can't move the cursor or forge a line."""
    try:
        shown = _decoder.decode(record)
    except ValueError as error:
        raise VerificationError("record", f"a stored record is none: {error}") from error
    labelled = {
        "principal": shown.principal,
        "model": "/".join(filter(None, (shown.model, shown.version))),
        "decision": shown.decision_id,
        "reasons": ", ".join(shown.reasons),
        "error": shown.error,
        "detail": shown.detail,
    }
    start = [_plain(shown.time), f"#{shown.seq}", _plain(shown.kind), _plain(shown.outcome)]
    return "  ".join([*start, *(f"{label}={_plain(value)}" for label, value in labelled.items() if value)])


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
