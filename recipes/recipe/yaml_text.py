"""YAML for recipes: duplicate keys are errors, and scalars are as in YAML 1.2 (`1e-4` is a number, `on` is text)."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from conversations.errors import ToolkitError

LONGEST = 1 << 20  # maximum size of a recipe, in bytes
DEEPEST = 100  # maximum nesting of lists and sections
LARGEST = 100_000  # values with aliases expanded: a few nested aliases can expand beyond any memory
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$")
_INT = re.compile(r"^[-+]?[0-9]+$")


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'key "{key_node.value}" is given twice', key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _integer(loader: Any, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)
    except ValueError as error:  # thousands of digits
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _with_yaml_1_2_scalars() -> None:
    replaced = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "timestamp")}
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _RecipeLoader.yaml_implicit_resolvers = kept
    _RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _RecipeLoader.add_constructor("tag:yaml.org,2002:int", _integer)


_with_yaml_1_2_scalars()


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML text. `name` is the file's name for errors.

    Raises:
        ToolkitError: the text is not valid YAML or exceeds a limit; names `name` and the line or the limit.
    """
    loader = None
    try:
        loader = _RecipeLoader(text)  # raises for characters that YAML does not allow
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _extent(node, {})
        if depth > DEEPEST:
            raise RecursionError
        if size > LARGEST:
            raise ToolkitError(
                f"{name}: holds {size:,} values, with its aliases written out; at most {LARGEST:,} are read"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ToolkitError(
            f"{name}: lists or sections are nested too deeply (at most {DEEPEST}), or contain themselves"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ToolkitError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ToolkitError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # from a bad tag or character
        raise ToolkitError(f"{name}: not valid YAML: a value is not what its tag or escape says ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _extent(node: yaml.Node, extents: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values and nesting depth of a node with all aliases expanded. Raises RecursionError for a node that
    contains itself."""
    if id(node) not in extents:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        children = [] if isinstance(node, yaml.ScalarNode) else [_extent(child, extents) for child in parts]
        extents[id(node)] = 1 + sum(size for size, _ in children), 1 + max((depth for _, depth in children), default=0)
    return extents[id(node)]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains one mapping.

    Raises:
        ToolkitError: the file is missing, not UTF-8, not YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise ToolkitError(f"{path}: too long for a recipe, which has at most {LONGEST:,} bytes")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise ToolkitError(f"no such recipe: {path}") from None
    except IsADirectoryError:
        raise ToolkitError(f"{path} is a directory, not a recipe; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise ToolkitError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ToolkitError(f"{path} cannot be read: {error.strerror}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise ToolkitError(f"{path}: a recipe is a mapping of keys, this file is {kind}")
    return value
