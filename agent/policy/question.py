"""A question in parts, and the memory of decisions.

Rules:

1. A decision is remembered only where the policy's syntax tree shows it to be a function of what is compared (:mod:`agent.policy.reads`):
   subject, action, resource and node whole, of the request the members that the policy can read. Compared is their JSON, which is
   what the engine would read.
2. Only what an engine decided is remembered; an error is asked again.
3. A memory belongs to one policy and is dropped with it. It has at most :data:`MAX_REMEMBERED` decisions; the oldest go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec
import orjson

from agent.records import Decision

__all__ = ["MAX_REMEMBERED", "Key", "Memory", "Question"]

MAX_REMEMBERED = 2048

Key: TypeAlias = tuple[bytes, str, bytes, bytes, bytes]


class Question(msgspec.Struct, frozen=True, gc=False):
    """An input document, version 1 (contract §4). The parts that many requests share are encoded once, by who keeps them.

    Attributes:
        subject: JSON of the principal.
        action: what is to be done.
        resource: JSON of the model, or nothing.
        node: JSON of the node's facts.
        request: the rest; what is unknown is absent.
    """

    subject: bytes
    action: str
    resource: bytes
    node: bytes
    request: Mapping[str, Any]

    def encode(self) -> bytes:
        """Return the document as JSON.

        Raises:
            TypeError: the request's part has no JSON form.
        """
        resource = b',"resource":' + self.resource if self.resource else b""
        return b'{"subject":%b,"action":%b%b,"request":%b,"node":%b}' % (
            self.subject,
            orjson.dumps(self.action),
            resource,
            orjson.dumps(self.request),
            self.node,
        )


class Memory:
    """Decisions of one policy.

    Args:
        reads: the members of ``input.request`` that the policy can read.
    """

    def __init__(self, reads: Iterable[str]) -> None:
        self._reads = tuple(reads)
        self._known: dict[Key, Decision] = {}

    def key(self, question: Question) -> Key:
        """Return what a decision on this question depends on.

        Raises:
            TypeError: the request's part has no JSON form.
        """
        request = question.request
        read = orjson.dumps({member: request[member] for member in self._reads if member in request})
        return question.subject, question.action, question.resource, question.node, read

    def get(self, question: Question) -> Decision | None:
        """Return what was decided on such a question before."""
        try:
            return self._known.get(self.key(question))
        except TypeError:
            return None  # it has no JSON form, so it was never asked

    def put(self, key: Key, decision: Decision) -> None:
        """Remember a decision."""
        if len(self._known) >= MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[key] = decision
