"""The operators' way to a controller: HTTPS with an admin's certificate, out of one directory.

The directory holds ``url``, ``ca.pem``, ``certificate.pem`` and ``key.pem``; ``edgewarden controller init`` and ``edgewarden admin create`` make one.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

from agent.errors import ConfigError, HostError, PolicyError

__all__ = ["Client", "admin_option", "json_option", "show_json", "write_admin"]

TIMEOUT_S = 90.0
MAX_ANSWER_BYTES = 64 << 20
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Client:
    """One admin's access."""

    directory: Path

    def call(self, method: str, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401 -- JSON
        """Call the controller and return its JSON.

        Raises:
            PolicyError: it refuses, with its words.
            ConfigError, HostError: the access is of no use, or nobody answers.
        """
        url = urlsplit(self._read("url").strip())
        connection = http.client.HTTPSConnection(
            url.hostname or "", url.port or 443, timeout=TIMEOUT_S, context=self._context()
        )
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES)
            answer = json.loads(data)
        except (OSError, http.client.HTTPException) as error:
            words = str(error) or type(error).__name__
            raise HostError(f"the controller at {url.geturl()} does not answer: {words}") from error
        except ValueError as error:
            raise HostError(f"what answers at {url.geturl()} is no controller") from error
        finally:
            connection.close()
        if response.status >= 300:  # noqa: PLR2004 -- refused
            raise PolicyError(str(answer.get("error", f"the controller answers {response.status}")))
        return answer

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=str(self.directory / "ca.pem"))
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(self.directory / "certificate.pem", self.directory / "key.pem")
        except OSError as error:
            raise ConfigError(f"{self.directory}: no admin's access: {error.strerror or error}; see --admin") from error
        return context

    def _read(self, name: str) -> str:
        try:
            return (self.directory / name).read_text()
        except OSError as error:
            raise ConfigError(f"{self.directory}: no admin's access: {error.strerror}; see --admin") from error


def write_admin(directory: Path, *, url: str, ca: str, certificate: str, key: bytes) -> None:
    """Write an admin's directory; the key is readable by its owner alone.

    Raises:
        ConfigError: it is there already, or can't be written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / "key.pem", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(key)
        for name, text in (("url", url + "\n"), ("ca.pem", ca), ("certificate.pem", certificate)):
            (directory / name).write_text(text)
    except FileExistsError as error:
        raise ConfigError(f"{directory}: it holds an admin's access already") from error
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error


def admin_option(function: _F) -> _F:
    """Add ``--admin``, handed over as a :class:`Client` called ``client``."""
    return click.option(
        "--admin",
        "client",
        type=click.Path(file_okay=False, path_type=Path),
        default=lambda: Path("~/.config/edgewarden").expanduser(),
        show_default="~/.config/edgewarden",
        envvar="EDGEWARDEN_ADMIN",
        callback=lambda _context, _option, value: Client(value),
        help="Directory with an admin's access to the controller.",
    )(function)


def json_option(function: _F) -> _F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def show_json(value: Any) -> None:  # noqa: ANN401 -- JSON
    """Print JSON."""
    click.echo(json.dumps(value, indent=2))
