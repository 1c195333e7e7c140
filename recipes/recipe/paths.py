"""Which strings of a recipe are paths, and what they are relative to.

Data files (`data`, `eval_data`, also inside tasks and a chain's stages) and a chain's stage recipes are relative to the
recipe file; the same keys in an override, or in a shipped recipe loaded by name, to the working directory. So is a data
file that is not beside the recipe but is there, such as one that a run has written. Everything else (models, runs,
output_dir) is always relative to the working directory. A leading `~` is the home directory.
"""

import os
import re
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.data_file import KINDS
from recipes.recipe.shipped import recipe_name

GENERATED = ("tiny:", "reasoning_gym:")
DATA_SUFFIXES = (*KINDS, ".zip", ".gz", ".zst", ".txt")
_OF_TASKS = ("path", "fewshot_path", "references", "baseline")
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(:[\w.-]+)?")


def absolute_paths(value: Any, base: Path, keys: tuple[str, ...] = ()) -> Any:
    """Make the relative file names in `value`, found under `keys` of a recipe, absolute from `base`.

    Raises:
        ToolkitError: a path with a null byte, or a home directory that does not exist.
    """
    if isinstance(value, dict):
        return {key: absolute_paths(item, base, (*keys, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [absolute_paths(item, base, (*keys, str(i))) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if "\0" in value:  # not allowed in a file name
        raise ToolkitError(f"{'.'.join(keys)}: contains a NUL byte; remove it")
    if _is_file_key(keys):
        return _absolute(value, base, data=keys[-1] != "recipe", key=".".join(keys))
    return from_home(value, ".".join(keys)) if _is_local_key(keys) else value


def from_home(text: str, key: str) -> str:
    """Expand a leading `~` or `~user`.

    Raises:
        ToolkitError: the user does not exist.
    """
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ToolkitError(f"{key}: {text!r}: no home directory of this name; write ./{text} for a file here") from None


def is_hub_name(path: str) -> bool:
    """Whether a data path can be a hub data set: OWNER/NAME or OWNER/NAME:CONFIG without a data file's suffix."""
    match = _HUB_NAME.fullmatch(path)
    return match is not None and not match["name"].endswith(DATA_SUFFIXES)


def _is_file_key(keys: tuple[str, ...]) -> bool:
    data = len(keys) >= 3 and keys[-1] == "path" and keys[-3] in ("data", "eval_data")
    data = data or (len(keys) >= 3 and keys[-1] in _OF_TASKS and keys[-3] == "tasks")
    data = data or (len(keys) >= 4 and keys[-2] == "against" and keys[-4] == "tasks")
    stage_recipe = len(keys) == 3 and keys[0] == "stages" and keys[2] == "recipe"
    return data or stage_recipe


def _is_local_key(keys: tuple[str, ...]) -> bool:
    """Whether the key holds a model, a run, or a file that a run writes."""
    model = keys[-2:] == ("model", "path") or (keys[-1:] == ("model",) and not {"rewards", "reward"}.isdisjoint(keys))
    model = model or keys[-2:-1] == ("models",) or (keys[-1:] == ("path",) and keys[-3:-2] == ("models",))
    return model or keys[-1:] in (("output_dir",), ("experts_file",))


def _absolute(text: str, base: Path, *, data: bool, key: str) -> str:
    if text.startswith((*GENERATED, "${")):
        return text
    path = base / from_home(text, key)
    if not data and not path.exists() and recipe_name(text):
        return text
    if data and is_hub_name(text) and not path.parent.is_dir():  # else a missing file in an existing folder
        return text
    if data and not path.exists() and (beside := Path.cwd() / from_home(text, key)).exists():
        path = beside
    return os.path.normpath(path.absolute())
