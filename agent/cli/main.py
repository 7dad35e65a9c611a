"""Entry point of ``edgewarden``: finds the verbs, turns our errors into clear words and exit codes."""

import importlib
import sys

import click

from agent import __version__
from agent.cli.plugins import load_plugin, plugin_names
from agent.config import quiet_libraries
from agent.errors import EdgeWardenError, PolicyError, VerificationError

__all__ = ["main"]

VERBS = {
    "run": "agent.cli.run",
    "attest": "agent.cli.attest",
    "model": "agent.cli.model",
    "policy": "agent.cli.policy",
    "log": "agent.cli.log",
    "doctor": "agent.cli.doctor",
}
PLUGINS = "edgewarden.commands"
EXIT_NO = 1
EXIT_ENVIRONMENT = 3


class _Verbs(click.Group):
    """Loads a verb's module only when it is used: ``edgewarden log tail`` must not pay for a TPM library."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [
            *super().list_commands(ctx),
            *VERBS,
            *plugin_names(PLUGINS),
        ]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return super().get_command(ctx, cmd_name) or load_plugin(PLUGINS, cmd_name)
        command = importlib.import_module(VERBS[cmd_name]).command
        if not isinstance(command, click.Command):
            raise click.UsageError(f"the module for {cmd_name!r} offers no command")
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgewarden")
def _edgewarden() -> None:
    """Verify, guard and prove what runs on this edge node."""


def main() -> None:
    """Run the command line and end the process with its exit code."""
    quiet_libraries()
    try:
        _edgewarden(prog_name="edgewarden")
    except (VerificationError, PolicyError) as error:
        click.echo(f"edgewarden: {error}", err=True)
        sys.exit(EXIT_NO)
    except EdgeWardenError as error:
        click.echo(f"edgewarden: {error}", err=True)
        sys.exit(EXIT_ENVIRONMENT)
