"""``edgewarden run``: the agent in the foreground, as the service manager starts it."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TextIO, cast

import click
import structlog

from agent.config import DEFAULT_CONFIG, json_schema, load, read_environment

__all__ = ["command"]


class _Lines:
    """Standard error, unbuffered.

    A line that can't be written (a full disk, a log daemon that is gone) is lost: it must stop nothing, and what must not be lost
    stands in the audit log.
    """

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Nothing waits."""


def _configure_log(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _Lines())),
        cache_logger_on_first_use=True,
    )


@click.command("run")
@click.option(
    "--config",
    "-c",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The node's configuration.",
)
@click.option("--check", is_flag=True, help="Read the configuration, say whether it is valid, and end.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the configuration, and end.")
def command(config: Path, *, check: bool, schema: bool) -> None:
    """Run the agent until SIGTERM; logs are JSON lines on standard error."""
    if schema:
        click.echo(json.dumps(json_schema(), indent=2))
        return
    settings = load(config)
    if check:
        click.echo(f"{config}: valid")
        return
    _configure_log(settings.node.log_level)
    from agent.daemon import run  # noqa: PLC0415 -- a check must not pay for the whole node

    run(settings, read_environment())
