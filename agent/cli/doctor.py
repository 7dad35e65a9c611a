"""``edgewarden doctor``: what this host lacks, and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import msgspec

from agent.host.doctor import Finding, Setup, examine

__all__ = ["EXIT_NO", "command", "report"]

EXIT_NO = 1
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_SHOWN = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@click.command("doctor")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/edgewarden"),
    show_default=True,
    help="Where the agent keeps its state.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), multiple=True, help="A key file or directory to check; repeat."
)
@click.option("--tcti", default="device:/dev/tpmrm0", show_default=True, help="The TPM's connection string.")
@click.option("--pcr", type=click.IntRange(0, 23), default=12, show_default=True, help="The measurement PCR.")
@click.option("--engine", type=click.Choice(["embedded", "opa"]), default="embedded", show_default=True)
@click.option("--opa", default="opa", show_default=True, help="The OPA binary, for --engine opa.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def command(
    *,
    state_dir: Path,
    keys: tuple[Path, ...],
    tcti: str,
    pcr: int,
    engine: Literal["embedded", "opa"],
    opa: str,
    as_json: bool,
) -> None:
    """Check this host. Exit code 1 when something that the agent needs is missing."""
    setup = Setup(state_directory=state_dir, private_files=keys, tcti=tcti, measurement_pcr=pcr, engine=engine, opa=opa)
    report(examine(setup), as_json=as_json)


def report(findings: tuple[Finding, ...], *, as_json: bool) -> None:
    """Print the findings and end the command with its exit code."""
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            level = click.style(f"{_SHOWN[finding.level]:4}", fg=_COLOURS[finding.level])
            click.echo(f"{level}  {finding.check:{width}}  {finding.found}")
            if finding.fix:
                click.echo(f"{'':{width + 8}}-> {finding.fix}")
    if any(finding.level == "fail" for finding in findings):
        click.get_current_context().exit(EXIT_NO)
