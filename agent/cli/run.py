"""``edgewarden run``: the agent in the foreground, as the service manager starts it."""

import json
import logging
import sys
from pathlib import Path

import click
import structlog

from agent.config import DEFAULT_CONFIG, json_schema, load, read_environment

__all__ = ["command"]


def _configure_log(level: str) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
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
