"""What a policy's decisions can depend on, read off its syntax tree.

Rules:

1. A decision is a function of the bundle and of its input when no module of the bundle calls a builtin that looks at anything else: the
   clock, a random source, the network, the engine's own state. Builtins are known to be functions by an allowlist; one that is new is none.
2. A policy reads a member of ``input.request`` when any module names it, in any rule, reachable or not. ``input`` or ``input.request`` as a
   whole, or with a member that is not a constant, means every member. What stands under a ``with`` counts like any other mention.
3. In doubt a policy reads everything: the answer then is that its decisions can't be remembered.

The other members of the input (subject, action, resource, node) are few and change seldom; whoever remembers decisions compares them whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["MAX_READS", "references", "request_reads"]

MAX_READS = 64

# Builtins of the engine that are functions of their arguments: whole namespaces, and single ones.
_PURE_NAMESPACES = re.compile(
    r"(?:__builtin_sets|array|base64|base64url|bits|glob|graph|hex|json|numbers|object|regex|semver|strings|units|urlquery|yaml)\..+"
)
_PURE = re.compile(
    r"net\.cidr_(?:contains|expand|is_valid)|uuid\.parse"
    r"|time\.(?:add_date|clock|date|diff|format|parse_duration_ns|parse_ns|parse_rfc3339_ns|weekday)"
    r"|abs|ceil|concat|contains|count|endswith|floor|format_int|indexof|indexof_n|intersection|lower|max|min|print|product|replace|round"
    r"|is_(?:array|boolean|null|number|object|set|string)|sort|split|sprintf|startswith|substring|sum|to_number|type_name|union|upper|walk"
    r"|trim|trim_(?:left|prefix|right|space|suffix)"
)


def request_reads(modules: Sequence[Mapping[str, Any]], builtins_called: Iterable[str]) -> tuple[str, ...] | None:
    """Return the members of ``input.request`` that the modules can read, sorted; None when their decisions can't be remembered.

    Args:
        modules: syntax trees, as Regorus gives them (``get_ast_as_json``).
        builtins_called: names of all builtins that they call.
    """
    if not all(_PURE.fullmatch(name) or _PURE_NAMESPACES.fullmatch(name) for name in builtins_called):
        return None
    reads: set[str] = set()
    for module in modules:
        for path in references(module["ast"], "input"):
            if not path or (path[0] == "request" and len(path) == 1):
                return None
            if path[0] == "request":
                reads.add(path[1])
    return tuple(sorted(reads)) if len(reads) <= MAX_READS else None


def references(node: Any, root: str) -> Iterator[tuple[str, ...]]:  # noqa: ANN401 -- any node of a JSON tree
    """Yield the path of every reference below ``root``, as far as it is constant; the bare variable is the empty path."""
    if isinstance(node, list):
        for value in node:
            yield from references(value, root)
    elif isinstance(node, dict):
        path, _ = _path(node)
        if path[:1] == (root,):
            yield path[1:]
        for kind, value in node.items():
            # Inside a reference only its brackets are looked at again: what stands before them is the same reference, shorter.
            yield from _brackets(value, root) if path and kind != "Var" else references(value, root)


def _brackets(reference: Mapping[str, Any], root: str) -> Iterator[tuple[str, ...]]:
    yield from references(reference.get("index", []), root)
    ((kind, inner),) = reference["refr"].items()
    if kind != "Var":
        yield from _brackets(inner, root)


def _path(node: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Return variable and constant members of a reference, and whether that is all of it; nothing for any other node."""
    if len(node) != 1:
        return (), False
    ((kind, inner),) = node.items()
    match kind:
        case "Var":
            return (str(inner["value"]),), True
        case "RefDot":
            member = str(inner["field"][-1])
        case "RefBrack" if "String" in inner["index"]:
            member = str(inner["index"]["String"]["value"])
        case "RefBrack":
            return _path(inner["refr"])[0], False
        case _:
            return (), False
    path, whole = _path(inner["refr"])
    return ((*path, member), True) if path and whole else (path, False)
