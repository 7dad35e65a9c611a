"""Memory for request bodies that are still on their way.

Rules:

1. A body is given memory by its announced length, or by the most it may have where it announces none, before a byte of it is read.
2. All bodies together stay below ``total_bytes``; those of one principal below ``share_bytes``, so that slow uploads of one client leave
   room for everyone else's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from agent.errors import PeerError

__all__ = ["BodyBudget"]


class BodyBudget:
    """Counts the bytes that are promised.

    Args:
        total_bytes: of all principals.
        share_bytes: of one principal.
    """

    def __init__(self, total_bytes: int, share_bytes: int) -> None:
        self._total = total_bytes
        self._share = share_bytes
        self._promised = 0
        self._by_principal: dict[str, int] = {}

    @contextmanager
    def reserve(self, principal_id: str, size: int) -> Iterator[None]:
        """Hold ``size`` bytes for the length of the block.

        Raises:
            PeerError: 429 where the principal's share is used up, 503 where all memory is.
        """
        mine = self._by_principal.get(principal_id, 0)
        if mine and mine + size > self._share:
            raise PeerError(429, "bodies_in_flight", "too many bytes are on their way", retry_after_s=1.0)
        if self._promised and self._promised + size > self._total:
            raise PeerError(503, "overloaded", "the node has as many bytes as it can hold", retry_after_s=1.0)
        self._promised += size
        self._by_principal[principal_id] = mine + size
        try:
            yield
        finally:
            self._promised -= size
            left = self._by_principal.get(principal_id, 0) - size
            if left > 0:
                self._by_principal[principal_id] = left
            else:
                self._by_principal.pop(principal_id, None)
