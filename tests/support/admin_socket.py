"""Somebody who answers one call on a Unix socket, in the agent's place."""

import contextlib
import socket
import tempfile
import threading
from pathlib import Path

__all__ = ["ANSWER", "answering"]

ANSWER = b"HTTP/1.1 409 Conflict\r\nContent-Length: %d\r\n\r\n%b"


@contextlib.contextmanager
def answering(answer: bytes, *, after: bytes = b"\r\n\r\n"):
    """Answer one call once it ends with ``after``; yields the socket's path and what was asked."""
    asked: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "admin.sock"
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                call = b""
                while not call.endswith(after):
                    call += connection.recv(65536)
                asked.append(call)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path, asked
        finally:
            thread.join()
