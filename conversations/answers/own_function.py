"""A user-defined reward: a function in a file, called as TRL calls its reward functions. No torch."""

import asyncio
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError

FORM = '"FILE.py:FUNCTION", such as "my_rewards.py:score"'


def place_of(written: str) -> tuple[Path, str]:
    """(file, name of the function) of "FILE.py:FUNCTION". Raises ToolkitError for anything else."""
    path, _, name = written.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ToolkitError(f"{written!r} names no function: it must be {FORM}")
    return Path(path).expanduser(), name


@cache
def loaded(written: str) -> Callable[..., Any]:
    """The function. Raises ToolkitError where the file cannot be read or run, or has no such function."""
    path, name = place_of(written)
    if not path.is_file():
        raise ToolkitError(f"{path}: there is no such file; {written!r} is looked up from the current folder")
    spec = importlib.util.spec_from_file_location(f"own_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE` has it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ToolkitError(_told(path, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ToolkitError(f"{path}: defines no function {name}")
    return function


def check_loaded(written: Sequence[str]) -> list[bool]:
    """True for each function that can be loaded; raises as `loaded`."""
    return [callable(loaded(one)) for one in written]


def call(written: str, answers: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The function's values for answers, each {"prompt": messages, "completion": text, and columns of its row}. It is
    handed lists: prompts, completions (lists of messages), and of the columns those that it takes.

    Raises:
        ToolkitError: what the function raised, with its line; or what it gave, where that is not a number for each.
    """
    function = loaded(written)
    columns = {key: [answer[key] for answer in answers] for key in answers[0] if key not in ("prompt", "completion")}
    taken = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        columns = {key: values for key, values in columns.items() if key in taken}
    prompts = [answer["prompt"] for answer in answers]
    completions = [[{"role": "assistant", "content": answer["completion"]}] for answer in answers]
    try:
        values = function(prompts=prompts, completions=completions, **columns)
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
        values = list(values)
    except Exception as error:
        raise ToolkitError(_told(place_of(written)[0], error)) from error
    if len(values) != len(answers):
        raise ToolkitError(f"{written}: gave {len(values)} values for {len(answers)} answers")
    return [_number(written, value) for value in values]


def _number(written: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ToolkitError(f"{written}: gave {value!r:.60}, where a number or None is needed") from None


def _told(path: Path, error: Exception) -> str:
    """The error, with the line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}: {error.msg}"
    frames, here = traceback.extract_tb(error.__traceback__), path.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{place}: {type(error).__name__}: {error}"[:500]
