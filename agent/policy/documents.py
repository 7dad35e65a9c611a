"""Strict JSON and YAML documents: one meaning for the same bytes, whoever reads them.

Rules:

1. A document is UTF-8; an object's keys are unique strings; numbers are finite; nesting stops at
   :data:`MAX_DOCUMENT_DEPTH`. What two parsers could read differently is refused, not guessed.
2. YAML is the subset that means the same in YAML 1.1, 1.2 and JSON: no anchors, aliases, tags or merge keys; a plain
   scalar that only YAML 1.1 takes for a boolean, a number or a date must be quoted.
3. A digest of a structured document is independent of white space and of the order of keys, byte for byte as OPA
   hashes it for ``.signatures.json`` (``v1/bundle/hash.go``).
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import yaml

from agent.errors import VerificationError

__all__ = ["MAX_DOCUMENT_DEPTH", "MAX_YAML_BYTES", "Document", "hashable_form", "parse_json", "parse_yaml"]

Document: TypeAlias = "bool | int | float | str | list[Document] | dict[str, Document] | None"

MAX_DOCUMENT_DEPTH = 64  # serde_json inside the engine stops at 128
MAX_YAML_BYTES = 1 << 20  # larger data is JSON's: YAML takes a hundred times as long to read
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)
_YAML_12_NUMBER = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|0o[0-7]+", re.ASCII)
_JSON_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_STRING_TAG = "tag:yaml.org,2002:str"
_CHECK = "bundle-document"


class _NumberText(str):
    """A number as it was written; a digest is taken over the text, not over a float."""

    __slots__ = ()


def parse_json(name: str, data: bytes) -> Document:
    """Decode one JSON document.

    Args:
        name: what the document is called in errors.
        data: UTF-8, without a byte order mark.

    Raises:
        VerificationError: ``bundle-document``.
    """
    return _load(name, data, _finite, int)


def hashable_form(name: str, data: bytes, *, is_yaml: bool) -> bytes:
    """Return the bytes over which OPA takes the digest of a structured document.

    Objects are written with sorted keys and without white space, numbers as they stand, strings as Go's
    ``encoding/json`` writes them with HTML escaping off.

    Raises:
        VerificationError: ``bundle-document``.
    """
    value = parse_yaml(name, data) if is_yaml else _load(name, data, _NumberText, _NumberText)
    return b"".join(_written(value))


def _written(value: Document) -> Iterator[bytes]:
    match value:
        case _NumberText():
            yield value.encode()
        case dict():
            yield b"{"
            for position, key in enumerate(sorted(value)):
                yield b"," if position else b""
                yield from _written(key)
                yield b":"
                yield from _written(value[key])
            yield b"}"
        case list():
            yield b"["
            for position, member in enumerate(value):
                yield b"," if position else b""
                yield from _written(member)
            yield b"]"
        case _:
            text = json.dumps(value, ensure_ascii=False)
            yield text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()


def _load(name: str, data: bytes, as_float: Callable[[str], Any], as_int: Callable[[str], Any]) -> Document:
    try:
        text = data.decode()
        value: Document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=as_float,
            parse_int=as_int,
        )
        _check_tree(value)
    except (ValueError, RecursionError) as error:
        raise VerificationError(_CHECK, f"{name} is not strict JSON: {error}") from error
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is past the range of a double")
    return number


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for position, key in enumerate(keys) if key in keys[:position])
        raise ValueError(f"the key {twice!r} stands twice")
    return value


def _check_tree(value: Document, depth: int = 0) -> None:
    if depth > MAX_DOCUMENT_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DOCUMENT_DEPTH}")
    match value:
        case str():
            value.encode()  # a lone surrogate has no UTF-8: UnicodeEncodeError is a ValueError
        case dict():
            for key, member in value.items():
                key.encode()
                _check_tree(member, depth + 1)
        case list():
            for member in value:
                _check_tree(member, depth + 1)
        case _:
            pass


def parse_yaml(name: str, data: bytes) -> Document:
    """Decode one YAML document of the subset that rule 2 names.

    Raises:
        VerificationError: ``bundle-document``.
    """
    if len(data) > MAX_YAML_BYTES:
        raise VerificationError(_CHECK, f"{name} has over {MAX_YAML_BYTES} bytes of YAML; write it as data.json")
    try:
        text = data.decode()
        _check_events(text)
        node = yaml.compose(text, Loader=yaml.CSafeLoader)
        value = None if node is None else _from_node(node)
    except (ValueError, yaml.YAMLError) as error:
        raise VerificationError(_CHECK, f"{name} is not plain YAML: {error}") from error
    return value


def _check_events(text: str) -> None:
    """Refuse anchors, aliases and depth before the composer, which recurses, sees the document."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError(f"{_place(event)}: anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{_place(event)}: tags are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DOCUMENT_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DOCUMENT_DEPTH}")


def _place(part: yaml.Event | yaml.Node) -> str:
    return "somewhere" if part.start_mark is None else f"line {part.start_mark.line + 1}"


def _from_node(node: yaml.Node) -> Document:
    if isinstance(node, yaml.SequenceNode):
        return [_from_node(member) for member in node.value]
    if isinstance(node, yaml.MappingNode):
        pairs = [(_from_node(key), _from_node(value)) for key, value in node.value]
        if not all(isinstance(key, str) for key, _ in pairs):
            raise ValueError(f"{_place(node)}: a key is not a string; quote it")
        return _unique([(str(key), value) for key, value in pairs])
    text: str = node.value
    if node.tag == _STRING_TAG:
        if not getattr(node, "style", None) and _YAML_12_NUMBER.fullmatch(text):
            raise ValueError(
                f"{_place(node)}: {text[:40]!r} is a number in YAML 1.2; quote it, or write it as JSON does"
            )
        return text
    if text in _JSON_WORDS:
        return _JSON_WORDS[text]
    if _JSON_NUMBER.fullmatch(text):
        return _finite(text) if any(mark in text for mark in ".eE") else int(text)
    raise ValueError(f"{_place(node)}: {text[:40]!r} is no string in YAML 1.1; quote it")
