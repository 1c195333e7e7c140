"""Sources without a file: the demo's generator (`tiny:NAME`) and tasks of reasoning-gym (`reasoning_gym:TASK`)."""

import json
import re
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from conversations.answers.gym import need_gym, questions
from conversations.errors import ToolkitError
from recipes.files import write_jsonl
from recipes.processes import main_first

_TINY = re.compile(r"tiny:(?P<name>[a-z_]+)(\?(?P<settings>.*))?")
_GYM = re.compile(r"reasoning_gym:(?P<name>\w+)(\?(?P<settings>.*))?")
QUESTIONS = 500  # of a task of reasoning-gym, whose recipe gives no n


def generated(path: str, seed: int, key: str, cache: Path) -> Path:
    """Generate what a source names, and return its file.

    Args:
        seed: if the source gives none.
        key: the source's key in the recipe, for errors.

    Raises:
        ToolkitError: there is no such generator, task or setting, or its package is not installed.
    """
    return (_tiny if path.startswith("tiny:") else _gym)(path, seed, f"{key}.path", cache)


def _tiny(path: str, seed: int, key: str, cache: Path) -> Path:
    from recipes.tiny.world import materialize

    match = _TINY.fullmatch(path)
    settings = _settings(match)
    numbers = {name: int(value) for name, value in settings.items() if value.isdecimal()}
    if match is None or not {"seed", "n"}.issuperset(settings) or len(numbers) != len(settings):
        raise ToolkitError(f"{key}: {path!r} is not tiny:NAME, tiny:NAME?seed=7 or tiny:NAME?seed=7&n=1000")
    chosen, count = numbers.get("seed", seed), numbers.get("n")
    folder = cache / "tiny" / "data" / f"seed-{chosen}"
    return main_first(lambda: materialize(match["name"], chosen, count, folder))


def _gym(path: str, seed: int, key: str, cache: Path) -> Path:
    """In a file named after everything that the questions depend on."""
    match = _GYM.fullmatch(path)
    if match is None:
        raise ToolkitError(f"{key}: {path!r} is not reasoning_gym:TASK or reasoning_gym:TASK?seed=7&n=1000")
    settings = {name: _value(text) for name, text in _settings(match).items()}
    count = settings.pop("n", QUESTIONS)
    if type(count) is not int or count < 1:
        raise ToolkitError(f"{key}: {path!r}: n, the number of questions, must be a whole number above 0")
    settings = {"seed": seed, "size": count, **settings}
    try:
        need_gym()
        made = f"{version('reasoning-gym')} {match['name']} {json.dumps(settings, sort_keys=True)}"
        file = cache / "reasoning_gym" / f"{match['name']}-{sha256(made.encode()).hexdigest()[:16]}.jsonl"
        return main_first(lambda: file if file.is_file() else _written(file, match["name"], settings))
    except ToolkitError as error:
        raise ToolkitError(f"{key}: {error}") from None


def _written(file: Path, task: str, settings: dict[str, Any]) -> Path:
    write_jsonl(file, questions(task, settings))
    return file


def _settings(match: re.Match[str] | None) -> dict[str, str]:
    return dict(parse_qsl(match["settings"] or "", keep_blank_values=True)) if match else {}


def _value(text: str) -> Any:
    """A number, true, false, null or a list, as in JSON; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
