"""Command-line overrides: `key.path=value`, where the value is YAML.

A number in the path is a list index; entries with a `name` may also be addressed by name
(`stages.sft.training.max_steps=2`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conversations.errors import ToolkitError
from recipes.recipe.yaml_text import parse_yaml
from recipes.terminal import is_unicode

LONGEST_PATH, DEEPEST_PATH = 300, 30  # characters, and keys


@dataclass(frozen=True)
class Override:
    """A parsed override: `keys` is the path, `value` the parsed YAML."""

    keys: tuple[str, ...]
    value: Any

    @property
    def path(self) -> str:
        return ".".join(self.keys)


def parse_override(text: str) -> Override:
    """Parse `key.path=value`.

    Raises:
        ToolkitError: no `=`, an empty key, a path that is too long, bytes that are not UTF-8, or a value that is not
            YAML. The message never shows the value, which may be a secret.
    """
    path, equals, value = text.partition("=")
    keys = tuple(path.strip().split("."))
    if len(path) > LONGEST_PATH or len(keys) > DEEPEST_PATH:
        raise ToolkitError(
            f'an override that begins "{path[:60]}" is too long: a key.path has at most {LONGEST_PATH} characters and '
            f"{DEEPEST_PATH} keys"
        )
    if not equals or not all(keys):
        raise ToolkitError(
            f'"{path}{equals and "=..."}" is not an override; write key.path=value, such as model.path=runs/sft'
        )
    if not is_unicode(text):
        raise ToolkitError(f'override "{path.strip()}" is not valid UTF-8')
    return Override(keys, parse_yaml(value, f'override "{path.strip()}"'))


def apply_override(tree: dict[str, Any], override: Override) -> None:
    """Set one value in `tree`, in place; missing sections are created, lists are never extended.

    Raises:
        ToolkitError: the path leads through a value that has no keys, or past the end of a list.
    """
    node: Any = tree
    for depth, key in enumerate(override.keys[:-1]):
        child = _get(node, key, override, depth)
        if child is None:
            child = {}
            _set(node, key, child, override, depth)
        node = child
    _set(node, override.keys[-1], override.value, override, len(override.keys) - 1)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge `changes` into a copy of `base`: mappings are merged key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _get(node: Any, key: str, override: Override, depth: int) -> Any:
    if isinstance(node, dict):
        return node.get(key)
    if isinstance(node, list):
        return node[_index(node, key, override, depth)]
    raise _not_a_section(node, override, depth)


def _set(node: Any, key: str, value: Any, override: Override, depth: int) -> None:
    if isinstance(node, dict):
        node[key] = value
    elif isinstance(node, list):
        node[_index(node, key, override, depth)] = value
    else:
        raise _not_a_section(node, override, depth)


def _index(items: Sequence[Any], key: str, override: Override, depth: int) -> int:
    if key.isdecimal() and len(key) < 10 and int(key) < len(items):
        return int(key)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    where = ".".join(override.keys[:depth])
    by_name = ", ".join(str(name) for name in names if name)
    available = f"0 to {len(items) - 1}" if len(items) > 1 else "only 0" if items else "none: it is empty"
    raise ToolkitError(
        f'override "{override.path}": {where} has no entry "{key}"; its entries are {available}'
        + (f" ({by_name})" if by_name else "")
    )


def _not_a_section(node: Any, override: Override, depth: int) -> ToolkitError:
    where = ".".join(override.keys[:depth])
    return ToolkitError(f'override "{override.path}": {where} is {node!r}, not a section with keys')
