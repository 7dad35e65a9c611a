"""Sub-commands of other packages, found by entry points, so that the node's package never imports them."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import click

__all__ = ["PluginGroup", "load_plugin", "plugin_names"]


def plugin_names(group: str) -> list[str]:
    """Return the names that a group of entry points offers."""
    return sorted(point.name for point in entry_points(group=group))


def load_plugin(group: str, name: str) -> click.Command | None:
    """Return a sub-command of another package.

    Raises:
        click.UsageError: what is there is no command.
    """
    found = entry_points(group=group, name=name)
    if not found:
        return None
    command = next(iter(found)).load()
    if not isinstance(command, click.Command):
        raise click.UsageError(f"the plug-in for {name!r} offers no command")
    return command


class PluginGroup(click.Group):
    """A group that others may add to.

    Args:
        plugins: group of entry points.
    """

    def __init__(self, *args: Any, plugins: str, **kwargs: Any) -> None:  # noqa: ANN401 -- click's own arguments
        super().__init__(*args, **kwargs)
        self._plugins = plugins

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return our own and others'."""
        return sorted({*super().list_commands(ctx), *plugin_names(self._plugins)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return our own first."""
        return super().get_command(ctx, cmd_name) or load_plugin(self._plugins, cmd_name)
