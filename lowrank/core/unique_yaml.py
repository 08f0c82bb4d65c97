"""YAML whose mappings have each key once; PyYAML itself keeps the last of several values."""

from collections.abc import Iterator
from typing import Any

import yaml

from lowrank.core.errors import UserError


def load(where: str, text: str) -> Any:
    """The value of a YAML text. Raises UserError naming the line of a key that is there twice, and `yaml.YAMLError`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for mapping in _mappings(root, set()) if root else ():
        lines: dict[tuple[str, str], int] = {}
        for key, _ in mapping.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines and isinstance(key, yaml.ScalarNode):
                raise UserError(f"{where}:{line}: the key {key.value!r} is there twice, first on line {lines[name]}")
            lines[name] = line
    return yaml.safe_load(text)


def _mappings(node: yaml.Node, seen: set[int]) -> Iterator[yaml.MappingNode]:
    """All mappings inside a node, each once, though aliases may name it many times."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        yield node
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    for child in children:
        yield from _mappings(child, seen)
