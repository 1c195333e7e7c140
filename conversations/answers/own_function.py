"""A user-defined reward: a function in a file, called as TRL calls its reward functions. No torch."""

import asyncio
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.tally import counted

FORM = '"FILE.py:FUNCTION", such as "my_rewards.py:score"'


def place_of(spec: str) -> tuple[Path, str]:
    """(file, function name) of "FILE.py:FUNCTION". Raises ToolkitError for anything else."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ToolkitError(f"{spec!r} does not name a function: it must be {FORM}")
    return Path(path).expanduser(), name


@cache
def loaded(function_spec: str) -> Callable[..., Any]:
    """The function. Raises ToolkitError if the file cannot be read or run, or has no such function."""
    path, name = place_of(function_spec)
    if not path.is_file():
        raise ToolkitError(f"{path}: there is no such file; {function_spec!r} is looked up from the current folder")
    spec = importlib.util.spec_from_file_location(f"own_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    sys.path.insert(0, str(path.parent.resolve()))  # as `python FILE` does
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit() would end the run
        raise ToolkitError(located_error(path, error)) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ToolkitError(f"{path}: defines no function {name}")
    return function


def check_loaded(specs: Sequence[str]) -> list[bool]:
    """True for each function that can be loaded; raises as `loaded`."""
    return [callable(loaded(spec)) for spec in specs]


def call(spec: str, answers: Sequence[Mapping[str, Any]]) -> list[float | ToolkitError | None]:
    """The function's values for answers, each {"prompt": messages, "completion": text, and columns of its row}; a
    ToolkitError for what is not a number or None, and for each answer if there is not one value for each.

    The function receives lists: prompts, completions (lists of messages), and the columns that it has parameters for.

    Raises:
        ToolkitError: the function raised an error (the message names its line).
    """
    function = loaded(spec)
    columns = {key: [answer[key] for answer in answers] for key in answers[0] if key not in ("prompt", "completion")}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        columns = {key: values for key, values in columns.items() if key in parameters}
    prompts = [answer["prompt"] for answer in answers]
    completions = [[{"role": "assistant", "content": answer["completion"]}] for answer in answers]
    try:
        values = function(prompts=prompts, completions=completions, **columns)
        if inspect.iscoroutine(values):
            values = asyncio.run(values)
        if isinstance(values, (str, Mapping, Set)):  # a mapping's keys would pass for values
            raise TypeError(f"it returned a {type(values).__name__}, not a list with a number or None for each answer")
        values = list(values)
    except (Exception, SystemExit, asyncio.CancelledError) as error:  # sys.exit() would end the run
        raise ToolkitError(located_error(place_of(spec)[0], error)) from error
    if len(values) != len(answers):
        wrong = f"{spec}: returned {counted(len(values), 'value')} for {counted(len(answers), 'answer')}"
        return [ToolkitError(wrong)] * len(answers)
    return [_number(spec, value) for value in values]


def _number(spec: str, value: Any) -> float | ToolkitError | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return ToolkitError(f"{spec}: returned {value!r:.60}; it must return a number or None for each answer")


def located_error(path: Path, error: BaseException) -> str:
    """The error, with the line of the user's file."""
    if isinstance(error, SyntaxError):
        return f"{path}:{error.lineno}: {error.msg}"
    frames, user_file = traceback.extract_tb(error.__traceback__), path.resolve()
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == user_file]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{place}: {type(error).__name__}: {error}"[:500]
