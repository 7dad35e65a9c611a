"""For property tests of parsers: a value or the one error that may come out."""

from collections.abc import Callable
from typing import TypeVar

from agent.errors import PeerError

__all__ = ["value_or_refusal"]

_T = TypeVar("_T")


def value_or_refusal(call: Callable[[], _T]) -> _T | PeerError:
    """Return what the call returns, or the PeerError that it raises; anything else fails the test."""
    try:
        return call()
    except PeerError as refusal:
        return refusal
