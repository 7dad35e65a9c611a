"""YAML without what makes a small file large or ambiguous: no aliases, no duplicate keys, bounded depth, safe types only."""

from typing import Any, Final

import yaml

__all__ = ["MAX_DEPTH", "load"]

MAX_DEPTH: Final = 16


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
