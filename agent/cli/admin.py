"""The command line's way to a running agent: HTTP over its admin Unix socket."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from agent.errors import HostError

__all__ = ["TIMEOUT_S", "request"]

TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 1 << 20


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(
    socket_path: Path,
    method: str,
    path: str,
    body: bytes | None = None,
    content_type: str = "application/octet-stream",
    *,
    timeout_s: float = TIMEOUT_S,
) -> tuple[int, dict[str, Any]]:
    """Send one request and return the status and the JSON object that came back.

    Raises:
        HostError: the agent does not run, does not answer in time, or answers something else.
    """
    connection = _UnixConnection(socket_path, timeout_s)
    try:
        connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
        response = connection.getresponse()
        answer = json.loads(response.read(MAX_ANSWER_BYTES))
    except OSError as error:
        raise HostError(
            f"{socket_path}: the agent does not answer ({error.strerror or error}); is it running?"
        ) from error
    except (http.client.HTTPException, ValueError) as error:
        raise HostError(f"{socket_path}: the answer is not the agent's") from error
    finally:
        connection.close()
    if not isinstance(answer, dict):
        raise HostError(f"{socket_path}: the answer is not the agent's")
    return response.status, answer
