"""What the models said: the same prompts side by side across runs, and early against late within one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from recipes.report.charts import short
from recipes.report.metrics import count, number
from recipes.report.run_files import Run

MAX_PROMPTS = 12
MAX_CHARACTERS = 1200
# Keys of a sample that have a place of their own; any other plain value is listed below the completion.
_PLACED = {"step", "prompt", "completion", "reference", "rewards", "task", "meta", "row", "when", "value", "decoding"}

Key = tuple[str, str]  # task, prompt


@dataclass(frozen=True)
class Said:
    """One completion: its text, what it scored, and at which step (None: not stated)."""

    text: str
    marks: Sequence[str]
    step: float | None


@dataclass(frozen=True)
class Comparison:
    """One prompt and what each column said to it (None: nothing)."""

    task: str
    prompt: str
    reference: str
    said: Sequence[Said | None]


@dataclass(frozen=True)
class Gallery:
    """Prompts (rows) by models or steps (columns). `note` says what was chosen from how many."""

    columns: Sequence[str]
    rows: Sequence[Comparison]
    note: str


def across_runs(runs: Sequence[Run], titles: dict[str, str]) -> Gallery | None:
    """The prompts that the most runs answered (two at least), the latest step of each; as many of each task."""
    answers = {run.name: _by_prompt(run.samples) for run in runs}
    counts = Counter(key for found in answers.values() for key in found)
    most = max(counts.values(), default=0)
    if most < 2:
        return None
    shared = [key for key in counts if counts[key] == most]
    columns = [name for name, found in answers.items() if any(key in found for key in shared)]
    chosen = _spread_over_tasks(shared)
    rows = [_comparison(key, [answers[name].get(key, [])[-1:] for name in columns]) for key in chosen]
    note = f"{len(rows)} of {count(len(shared), 'prompt')} that {most} runs answered, the first of each task."
    return Gallery([titles.get(name, name) for name in columns], rows, note)


def within_run(run: Run) -> Gallery | None:
    """The same prompts at the first and the last step; where none recurs, some of the first and of the last."""
    steps = [step for row in run.samples if (step := number(row.get("step"))) is not None]
    if not steps or min(steps) == max(steps):
        return None
    first, last = (
        _by_prompt(row for row in run.samples if number(row.get("step")) == step) for step in (min(steps), max(steps))
    )
    columns = [f"step {min(steps):g}", f"step {max(steps):g}"]
    both = [key for key in first if key in last]
    if both:
        rows = [_comparison(key, [first[key][:1], last[key][:1]]) for key in _spread_over_tasks(both)]
        return Gallery(columns, rows, f"{len(rows)} of {count(len(both), 'prompt')} asked at both steps.")
    few = MAX_PROMPTS // 4
    rows = [_comparison(key, [first[key][:1], []]) for key in list(first)[:few]]
    rows += [_comparison(key, [[], last[key][:1]]) for key in list(last)[:few]]
    return Gallery(columns, rows, "No prompt was asked at both steps: the first prompts of each.")


def text_of(value: Any) -> str:
    """A prompt or completion as text: a string, one message, or several with their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if len(value) == 1:
            return str(value[0].get("content", ""))
        return "\n".join(f"{item.get('role', '?')}: {item.get('content', '')}" for item in value)
    return "" if value is None else str(value)


def _by_prompt(samples: Iterable[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Samples of each prompt in the order of their steps. Of several at one step the first counts."""
    found: dict[Key, dict[float, dict[str, Any]]] = {}
    for row in samples:
        if "completion" not in row:  # pairs that were scored, losses: nothing was said
            continue
        key = (text_of(row.get("task")), text_of(row.get("prompt")))
        found.setdefault(key, {}).setdefault(number(row.get("step")) or 0.0, row)
    return {key: [rows[step] for step in sorted(rows)] for key, rows in found.items()}


def _spread_over_tasks(keys: Sequence[Key]) -> list[Key]:
    """MAX_PROMPTS keys, taken in turn from the tasks, grouped by task again."""
    by_task: dict[str, list[Key]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(key)
    in_turn = [key for turn in zip_longest(*by_task.values()) for key in turn if key is not None]
    return sorted(in_turn[:MAX_PROMPTS], key=lambda key: list(by_task).index(key[0]))


def _comparison(key: Key, columns: Sequence[Sequence[dict[str, Any]]]) -> Comparison:
    task, prompt = key
    samples = [found[0] if found else None for found in columns]
    references = [text_of(row["reference"]) for row in samples if row and row.get("reference") is not None]
    said = [_said(row) if row else None for row in samples]
    return Comparison(task, _cut(prompt), _cut(references[0]) if references else "", said)


def _said(row: dict[str, Any]) -> Said:
    rewards = row.get("rewards")
    marks = {text_of(row.get("task")) or "value": row["value"]} if row.get("value") is not None else {}
    marks |= rewards if isinstance(rewards, dict) else {}
    marks |= {k: v for k, v in row.items() if k not in _PLACED and not isinstance(v, dict | list)}
    words = [str(row["decoding"])] if "decoding" in row else []
    words += [f"{name} {_mark(value)}" for name, value in marks.items()]
    return Said(_cut(text_of(row.get("completion"))), words, number(row.get("step")))


def _mark(value: Any) -> str:
    as_number = number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return short(as_number) if as_number is not None else str(value)


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)" if more > 0 else text
