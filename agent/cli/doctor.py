"""``edgewarden doctor``: what this host lacks, and how to mend it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import click
import msgspec

from agent.attest.tpm_thread import TpmThread
from agent.config import DEFAULT_CONFIG, PolicySettings, TpmSettings, load
from agent.host.doctor import Finding, Sandbox, Setup, examine
from agent.isolation.sandbox import probe

__all__ = ["EXIT_NO", "command", "report"]

EXIT_NO = 1
PCRS = 24
TPM_TIMEOUT_S = 5.0
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_SHOWN = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@click.command("doctor")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The node's configuration [default: {DEFAULT_CONFIG}, where it exists].",
)
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where the agent keeps its state.")
@click.option(
    "--keys", type=click.Path(path_type=Path), multiple=True, help="A key file or directory to check; repeat."
)
@click.option("--tcti", help="The TPM's connection string.")
@click.option("--pcr", type=click.IntRange(0, 23), help="The measurement PCR.")
@click.option("--engine", type=click.Choice(["embedded", "opa"]), help="The policy engine.")
@click.option("--opa", help="The OPA binary, for --engine opa.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def command(
    *,
    config: Path | None,
    state_dir: Path | None,
    keys: tuple[Path, ...],
    tcti: str | None,
    pcr: int | None,
    engine: Literal["embedded", "opa"] | None,
    opa: str | None,
    as_json: bool,
) -> None:
    """Check this host. Exit code 1 when something that the agent needs is missing.

    What no option says comes from the configuration, and without one from the defaults.
    """
    if config is None and DEFAULT_CONFIG.exists():
        config = DEFAULT_CONFIG
    settings = load(config) if config else None
    tpm = settings.tpm if settings else TpmSettings()
    policy = settings.policy if settings else PolicySettings()
    connection = tcti or tpm.tcti
    secrets = [Path(settings.inference.key)] if settings else []
    if settings and settings.control and settings.control.key:
        secrets.append(Path(settings.control.key))
    offered = probe()
    setup = Setup(
        state_directory=state_dir or Path(settings.node.state_dir if settings else "/var/lib/edgewarden"),
        private_files=(*secrets, *keys),
        tcti=connection,
        measurement_pcr=tpm.pcr if pcr is None else pcr,
        engine=engine or policy.engine,
        opa=opa or policy.opa_binary,
        sandbox=Sandbox(offered.landlock_abi, offered.seccomp, offered.mdwe),
        read_pcrs=lambda: asyncio.run(_read_pcrs(connection)),
    )
    report(examine(setup), as_json=as_json)


async def _read_pcrs(tcti: str) -> Mapping[str, Mapping[int, str]]:
    """Read the SHA-256 bank, and name the others; a TPM that is busy or hangs is an error after some seconds."""
    thread = TpmThread(tcti, call_timeout_s=TPM_TIMEOUT_S, connect_timeout_s=TPM_TIMEOUT_S)
    try:
        banks, values = await thread.call(lambda tpm: (tpm.banks, tpm.read_pcrs(range(PCRS))))
    finally:
        await thread.close()
    shown = {index: value.hex() for index, value in values.items()}
    return {bank: shown if bank == "sha256" else {} for bank in banks}


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
