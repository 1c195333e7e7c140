"""Which strings of a recipe are files, and what they are relative to.

Data files (`data`, `eval_data`, also inside tasks and a chain's stages) and a chain's stage recipes are relative to the
recipe file; the same keys in an override, and in a shipped recipe that is given by name, to the working directory.
Everything else (models, runs, output_dir) is relative to the working directory wherever it stands. In all of them a
leading `~` is the home directory.
"""

import os
import re
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.data_file import KINDS
from recipes.recipe.shipped import recipe_name

GENERATED = "tiny:"
DATA_SUFFIXES = (*KINDS, ".zip", ".gz", ".zst", ".txt")
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(:[\w.-]+)?")


def absolute_paths(value: Any, base: Path, keys: tuple[str, ...] = ()) -> Any:
    """`value`, found under `keys` of a recipe, with its relative file names made absolute from `base`.

    Raises:
        ToolkitError: text with a zero byte, or a home directory that there is not.
    """
    if isinstance(value, dict):
        return {key: absolute_paths(item, base, (*keys, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [absolute_paths(item, base, (*keys, str(i))) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if "\0" in value:  # which no file's name may have, and no system call takes
        raise ToolkitError(f"{'.'.join(keys)}: contains a NUL byte; remove it")
    if _is_file_key(keys):
        return _absolute(value, base, data=keys[-1] == "path", key=".".join(keys))
    return from_home(value, ".".join(keys)) if _is_local_key(keys) else value


def from_home(text: str, key: str) -> str:
    """A path with the home directory in the place of its `~` or `~user`.

    Raises:
        ToolkitError: there is no such user.
    """
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise ToolkitError(f"{key}: {text!r}: no home directory of this name; write ./{text} for a file here") from None


def is_hub_name(path: str) -> bool:
    """Whether a data path can name a hub data set: OWNER/NAME or OWNER/NAME:CONFIG, no data file's suffix."""
    match = _HUB_NAME.fullmatch(path)
    return match is not None and not match["name"].endswith(DATA_SUFFIXES)


def _is_file_key(keys: tuple[str, ...]) -> bool:
    data = len(keys) >= 3 and keys[-1] == "path" and keys[-3] in ("data", "eval_data")
    stage_recipe = len(keys) == 3 and keys[0] == "stages" and keys[2] == "recipe"
    return data or stage_recipe


def _is_local_key(keys: tuple[str, ...]) -> bool:
    """Whether a model, a run, or a file that a run makes stands here."""
    model = keys[-2:] == ("model", "path") or (keys[-1:] == ("model",) and "rewards" in keys)
    return model or keys[-1:] in (("output_dir",), ("experts_file",))


def _absolute(text: str, base: Path, *, data: bool, key: str) -> str:
    if text.startswith((GENERATED, "${")):
        return text
    path = base / from_home(text, key)
    if not data and not path.exists() and recipe_name(text):
        return text
    if data and is_hub_name(text) and not path.parent.is_dir():  # else a file that is missing in a folder of ours
        return text
    return os.path.normpath(path.absolute())
