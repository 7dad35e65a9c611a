"""What can be told of a module's source without parsing it.

Rule: strings and comments do not count; a quoted string ends at its line's end at the latest, so that an open quote cannot hide
what follows.
"""

import re

__all__ = ["bracket_depth", "calls_out"]

_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*(?:"|$)|`[^`]*(?:`|\Z)|#[^\n]*', re.MULTILINE)
_OUTBOUND = re.compile(r"\bhttp\s*\.\s*send\b|\bnet\s*\.\s*lookup_ip_addr\b")


def bracket_depth(source: str) -> int:
    """Return how deep the brackets are nested."""
    depth = deepest = 0
    for char in _LITERAL.sub(" ", source):
        if char in _OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif char in _CLOSING:
            depth = max(depth - 1, 0)
    return deepest


def calls_out(source: str) -> str | None:
    """Return the builtin by which a module would reach the network; None when it names none."""
    found = _OUTBOUND.search(_LITERAL.sub(" ", source))
    return None if found is None else re.sub(r"\s", "", found[0])
