"""YAML without what makes a small file large or ambiguous: no aliases, no duplicate keys, bounded depth, safe types only."""

from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml

from agent.errors import ConfigError

__all__ = ["MAX_DEPTH", "MAX_SETTINGS_BYTES", "load", "read_settings"]

MAX_DEPTH: Final = 16
MAX_SETTINGS_BYTES: Final = 256 * 1024
_T = TypeVar("_T")


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", None)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, f"nested deeper than {MAX_DEPTH}", None)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a scalar", key_node.start_mark)
            if key_node.value in seen:
                words = f"a key occurs twice: {key_node.value[:80]!r}"
                raise yaml.constructor.ConstructorError(None, None, words, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def load(data: bytes) -> Any:  # noqa: ANN401 -- whatever the document holds; the caller validates it
    """Parse one document.

    Raises:
        ValueError: it is not YAML of this kind; the text says where.
    """
    try:
        return yaml.load(data, Loader=_Loader)  # noqa: S506 -- a subclass of the safe loader, narrowed
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_settings(path: Path, schema: type[_T], *, hint: str = "") -> _T:
    """Read a file of settings.

    Args:
        path: where it lies.
        schema: what it must be; an empty file is an empty mapping.
        hint: what to do where there is no such file.

    Raises:
        ConfigError: unreadable, over :data:`MAX_SETTINGS_BYTES`, not YAML, or not the schema; the text names the place.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}{hint}") from error
    if len(text) > MAX_SETTINGS_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_SETTINGS_BYTES} bytes")
    try:
        return msgspec.convert(load(text) or {}, schema)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
