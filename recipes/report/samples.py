"""What the models answered: the same prompts side by side across runs, and early versus late within one run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from recipes.results.words import count, number, plain

MAX_PROMPTS = 12
MAX_CHARACTERS = 1200
TOTAL = "reward"  # of a sample: the weighted sum of its rewards
# Keys of a sample that have a place of their own; any other plain value is listed below the completion.
_PLACED = {
    "step",
    "prompt",
    "completion",
    "reference",
    "rewards",
    "reasons",
    "task",
    "meta",
    "row",
    "answer",
    "when",
    "value",
    "decoding",
}

Key = tuple[str, str]  # task, prompt
Answers = dict[Key, dict[float, dict[str, Any]]]  # of each prompt, the sample at each step, in their order


@dataclass(frozen=True)
class Completion:
    """One completion: its text, and what it scored."""

    text: str
    marks: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """One prompt and the completion in each column (None: there is none)."""

    task: str
    prompt: str
    reference: str
    completions: Sequence[Completion | None]


@dataclass(frozen=True)
class Gallery:
    """Prompts (rows) by models or steps (columns). `note` says what was chosen from how many."""

    columns: Sequence[str]
    rows: Sequence[Comparison]
    note: str


def answers(samples: Iterable[dict[str, Any]]) -> Answers:
    """The completions of each prompt by step (0 if a sample has none); of several at one step, the first."""
    completions = [row for row in samples if "completion" in row]  # others are pairs that were scored, or losses
    steps = [*map(number, [row.get("step") for row in completions])]
    by_prompt: Answers = {}
    for row, step in zip(completions, steps, strict=True):
        key = (text_of(row.get("task")), text_of(row.get("prompt")))
        by_prompt.setdefault(key, {}).setdefault(step if step is not None and math.isfinite(step) else 0.0, row)
    return {key: {step: rows[step] for step in sorted(rows)} for key, rows in by_prompt.items()}


def across_runs(completions: Sequence[tuple[str, Answers]]) -> Gallery | None:
    """The prompts that the most runs (at least two) answered, at the latest step of each; equally many of each task.

    completions: the title of each run, and its answers.
    """
    counts = Counter(key for _, run_answers in completions for key in run_answers)
    most = max(counts.values(), default=0)
    if most < 2:
        return None
    shared = [key for key in counts if counts[key] == most]
    columns = [(title, run_answers) for title, run_answers in completions if any(key in run_answers for key in shared)]
    rows = [
        _comparison(key, [[*run_answers.get(key, {}).values()][-1:] for _, run_answers in columns])
        for key in _spread_over_tasks(shared)
    ]
    note = f"{len(rows)} of {count(len(shared), 'prompt')} that {most} runs answered, the first of each task."
    return Gallery([title for title, _ in columns], rows, note)


def within_run(answers_of_run: Answers) -> Gallery | None:
    """The same prompts at the first and the last step; if none recurs, some prompts of each."""
    steps = [step for rows in answers_of_run.values() for step in rows]
    if not steps or min(steps) == max(steps):
        return None
    ends = (min(steps), max(steps))
    first, last = ({key: rows[step] for key, rows in answers_of_run.items() if step in rows} for step in ends)
    columns = [f"step {min(steps):g}", f"step {max(steps):g}"]
    common = [key for key in first if key in last]
    if common:
        rows = [_comparison(key, [[first[key]], [last[key]]]) for key in _spread_over_tasks(common)]
        return Gallery(columns, rows, f"{len(rows)} of {count(len(common), 'prompt')} asked at both steps.")
    per_step = MAX_PROMPTS // 4
    rows = [_comparison(key, [[first[key]], []]) for key in list(first)[:per_step]]
    rows += [_comparison(key, [[], [last[key]]]) for key in list(last)[:per_step]]
    return Gallery(columns, rows, "No prompt was asked at both steps; these are the first prompts of each.")


def best_and_worst(samples: Iterable[dict[str, Any]]) -> Gallery | None:
    """Of prompts with several answers, those with the highest and the lowest reward."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for sample in samples:
        if "answer" in sample and number(sample.get(TOTAL)) is not None:
            by_prompt.setdefault(text_of(sample.get("prompt")), []).append(sample)
    unlike = {prompt: ranked for prompt, of in by_prompt.items() if (ranked := _ranked(of))}
    if not unlike:
        return None
    rows = [_comparison(("", prompt), [best, worst]) for prompt, (best, worst) in list(unlike.items())[:MAX_PROMPTS]]
    note = f"{len(rows)} of {count(len(unlike), 'prompt')} whose answers differ in reward."
    return Gallery(["highest reward", "lowest reward"], rows, note)


def _ranked(answers: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """A best and a worst of the answers to one prompt; None if all have the same reward."""
    ordered = sorted(answers, key=lambda sample: sample[TOTAL])
    return ([ordered[-1]], [ordered[0]]) if ordered[-1][TOTAL] > ordered[0][TOTAL] else None


def text_of(value: Any) -> str:
    """A prompt or completion as text: a string, one message, or several with their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if len(value) == 1:
            return str(value[0].get("content", ""))
        return "\n".join(f"{item.get('role', '?')}: {item.get('content', '')}" for item in value)
    return "" if value is None else str(value)


def _spread_over_tasks(keys: Sequence[Key]) -> list[Key]:
    """MAX_PROMPTS keys, taken in turn from the tasks, grouped by task again."""
    by_task: dict[str, list[Key]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(key)
    in_turn = [key for turn in zip_longest(*by_task.values()) for key in turn if key is not None]
    return sorted(in_turn[:MAX_PROMPTS], key=lambda key: list(by_task).index(key[0]))


def _comparison(key: Key, columns: Sequence[Sequence[dict[str, Any]]]) -> Comparison:
    task, prompt = key
    samples = [rows[0] if rows else None for rows in columns]
    references = [text_of(row["reference"]) for row in samples if row and row.get("reference") is not None]
    completions = [_completion(row) if row else None for row in samples]
    return Comparison(task, _cut(prompt), _cut(references[0]) if references else "", completions)


def _completion(row: dict[str, Any]) -> Completion:
    rewards, reasons = row.get("rewards"), row.get("reasons")
    reasons = reasons if isinstance(reasons, dict) else {}
    marks = {text_of(row.get("task")) or "value": row["value"]} if row.get("value") is not None else {}
    marks |= rewards if isinstance(rewards, dict) else {}
    marks |= {k: v for k, v in row.items() if k not in _PLACED and not isinstance(v, dict | list)}
    words = [str(row["decoding"])] if "decoding" in row else []
    words += [f"{k} {plain(v)}" + (f" ({_cut(text_of(reasons[k]))})" if k in reasons else "") for k, v in marks.items()]
    return Completion(_cut(text_of(row.get("completion"))), words)


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)" if more > 0 else text
