"""Tasks of the package reasoning-gym: their questions as rows, and the rule `reasoning_gym`, which is their own score.

A row's reference says how its question was made, not its answer: the package makes it again, and scores with it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from conversations.answers.extracting import final_line, last_boxes
from conversations.answers.verdict import Verdict, shown
from conversations.errors import ToolkitError
from conversations.row import Row

FORM = '{"task": NAME, "index": NUMBER, "settings": {...}}, as a source reasoning_gym:TASK gives it'
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def need_gym(settings: Mapping[str, Any] | None = None) -> None:
    """Raises ToolkitError if the package is not installed."""
    if find_spec("reasoning_gym") is None:
        raise ToolkitError("the package reasoning-gym is not installed: pip install 'deepseek-v2-toolkit[gym]'")


def questions(task: str, settings: Mapping[str, Any]) -> Iterator[Row]:
    """The questions of a task as conversations, with references for the rule.

    Args:
        settings: fields of the task's config, such as seed, and size, the number of questions.

    Raises:
        ToolkitError: the package is not installed, has no such task, or the task no such setting.
    """
    data = _data(task, json.dumps(settings, sort_keys=True))
    for index in range(len(data)):
        reference = {"task": task, "index": index, "settings": dict(settings)}
        yield {"messages": [{"role": "user", "content": data[index]["question"].strip()}], "reference": reference}


def reasoning_gym(completion: str, *, reference: Any) -> Verdict:
    """The task's own score of the final answer: what is between <answer> and </answer>, after "####" or in the last
    \\boxed; otherwise the whole text.

    Raises:
        ToolkitError: the reference names no question of an installed task.
    """
    data, entry = gym_reference(reference)
    tagged = _TAGGED.findall(completion)
    answer = tagged[-1].strip() if tagged else final_line(completion) or last_boxes(completion) or completion.strip()
    try:
        score = float(data.score_answer(answer, entry))
    except Exception as error:  # of all kinds, for answers that the task cannot read
        return Verdict(0.0, f"the task cannot read the answer {shown(answer)}: {type(error).__name__}")
    return Verdict(min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0, f"the task's score of {shown(answer)}")


def gym_reference(reference: Any) -> tuple[Any, dict[str, Any]]:
    """(the task's data set, the entry of the question). Raises ToolkitError if there is none."""
    try:
        row = json.loads(reference) if isinstance(reference, str) else reference
        task, index, settings = row["task"], row["index"], json.dumps(row["settings"], sort_keys=True)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise ToolkitError(f"a reference for the rule reasoning_gym must be {FORM}, not {reference!r:.60}") from None
    data = _data(task, settings)
    if type(index) is not int or not 0 <= index < len(data):
        raise ToolkitError(f"the reference names question {index!r:.20} of {task}, which has {len(data):,}")
    return data, _entry(task, settings, index)


@lru_cache(maxsize=4096)
def _entry(task: str, settings: str, index: int) -> dict[str, Any]:
    return _data(task, settings)[index]


@lru_cache(maxsize=64)
def _data(task: str, settings: str) -> Any:
    """settings: JSON."""
    need_gym()
    from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]
    from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]

    if task not in DATASETS:
        near = get_close_matches(str(task), list(DATASETS), 1)
        hint = f" (did you mean {near[0]!r}?)" if near else f"; it has: {', '.join(DATASETS)}"
        raise ToolkitError(f"reasoning-gym has no task {task!r}{hint}")
    try:
        return create_dataset(task, **json.loads(settings))
    except Exception as error:  # its configs check themselves by assertions
        raise ToolkitError(f"reasoning-gym's task {task}: {str(error) or type(error).__name__}"[:300]) from error
