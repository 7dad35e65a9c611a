"""``edgewarden controller status``: whether the replica on this machine works, and its figures."""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import TypedDict

import click
from prometheus_client.parser import text_string_to_metric_families

from agent.errors import ConfigError, HostError
from controller.cli.client import json_option, show_json
from controller.settings import DEFAULT_CONFIG, load, split_listen

__all__ = ["command"]

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 4 << 20
EXIT_NOT_READY = 1
_OWN = "edgewarden_controller_"


class _Figure(TypedDict):
    labels: dict[str, str]
    value: float


@click.command("status")
@click.option(
    "--config", "-c", type=click.Path(path_type=Path, dir_okay=False), default=DEFAULT_CONFIG, show_default=True
)
@json_option
def command(*, config: Path, as_json: bool) -> None:
    """Ask the replica on this machine. Exit code 0: ready; 1: not; 3: nobody answers."""
    listen = load(config).metrics.listen
    if listen is None:
        raise ConfigError(f"{config}: metrics.listen: name a loopback address and port; there is nobody to ask")
    address = split_listen("metrics.listen", listen)
    status, text = _get(address, "/readyz")
    try:
        why = str(json.loads(text)["why"])
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(f"what answers at {listen} is no controller") from error
    ready = status == http.client.OK
    figures = _figures(_get(address, "/metrics")[1])
    if as_json:
        show_json({"ready": ready, "why": why, "figures": figures})
    else:
        click.echo(f"{'ready' if ready else 'not ready':11} {why}")
        for name, samples in figures.items():
            for sample in samples:
                labels = " ".join(f"{key}={value}" for key, value in sample["labels"].items())
                click.echo(f"{name.removeprefix(_OWN):32} {sample['value']:<12g} {labels}".rstrip())
    if not ready:
        sys.exit(EXIT_NOT_READY)


def _get(address: tuple[str, int], path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER_BYTES).decode()
    except (OSError, http.client.HTTPException, ValueError) as error:
        words = str(error) or type(error).__name__
        raise HostError(f"no controller answers at {address[0]}:{address[1]}: {words}") from error
    finally:
        connection.close()


def _figures(text: str) -> dict[str, list[_Figure]]:
    """Read Prometheus' text; a histogram's buckets are for machines and left out."""
    found: dict[str, list[_Figure]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created")):
                found.setdefault(sample.name, []).append({"labels": sample.labels, "value": sample.value})
    return found
