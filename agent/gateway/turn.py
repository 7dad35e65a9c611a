"""What is due in one turn of the event loop: first everything is read, then everything is answered, then everything is sent.

A request runs through more code than a processor's nearest caches hold. Read, answered and sent one after the other, each of its steps finds
them cold; the same step many times in a row finds them warm.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

__all__ = ["Due", "Turn"]


class Due(Protocol):
    """A connection, as far as a turn knows it."""

    def answer(self) -> None:
        """Answer what has come."""

    def deliver(self, data: bytes, *, last: bool) -> None:
        """Send an answer, and end after the last one."""


class Turn:
    """What is due in one turn of the loop, of all connections of a server."""

    def __init__(self) -> None:
        self._ready: deque[Due] = deque()
        self._answers: deque[tuple[Due, bytes, bool]] | None = None  # while connections are answered

    def ready(self, connection: Due) -> None:
        """Let a connection answer what has come, once everything that came with it is read."""
        self._ready.append(connection)
        if len(self._ready) == 1:
            asyncio.get_running_loop().call_soon(self._run)

    def deliver(self, connection: Due, data: bytes, *, last: bool) -> None:
        """Send an answer, now or with the others of this turn."""
        if self._answers is None:
            connection.deliver(data, last=last)
        else:
            self._answers.append((connection, data, last))

    def _run(self) -> None:
        answers: deque[tuple[Due, bytes, bool]] = deque()
        self._answers = answers
        try:
            while self._ready:
                self._ready[0].answer()
                self._ready.popleft()
        finally:
            self._answers = None
            while answers:
                connection, data, last = answers.popleft()
                connection.deliver(data, last=last)
            if self._ready:  # one of them failed at what no handler does
                self._ready.popleft()
                asyncio.get_running_loop().call_soon(self._run)
