"""What the models said: the same prompts side by side across runs, and early against late within one run."""

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
class Said:
    """One completion: its text, and what it scored."""

    text: str
    marks: Sequence[str]


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


def answers(samples: Iterable[dict[str, Any]]) -> Answers:
    """What was said to each prompt, step by step (0 where none is stated). Of several at one step the first counts."""
    said = [row for row in samples if "completion" in row]  # others are pairs that were scored, or losses
    steps = [*map(number, [row.get("step") for row in said])]
    answered: Answers = {}
    for row, step in zip(said, steps, strict=True):
        key = (text_of(row.get("task")), text_of(row.get("prompt")))
        answered.setdefault(key, {}).setdefault(step if step is not None and math.isfinite(step) else 0.0, row)
    return {key: {step: rows[step] for step in sorted(rows)} for key, rows in answered.items()}


def across_runs(said: Sequence[tuple[str, Answers]]) -> Gallery | None:
    """The prompts that the most runs (two at least) answered, the latest step of each; as many of each task.

    said: the title of each run, and its answers.
    """
    counts = Counter(key for _, answered in said for key in answered)
    most = max(counts.values(), default=0)
    if most < 2:
        return None
    shared = [key for key in counts if counts[key] == most]
    columns = [(title, answered) for title, answered in said if any(key in answered for key in shared)]
    rows = [
        _comparison(key, [[*answered.get(key, {}).values()][-1:] for _, answered in columns])
        for key in _spread_over_tasks(shared)
    ]
    note = f"{len(rows)} of {count(len(shared), 'prompt')} that {most} runs answered, the first of each task."
    return Gallery([title for title, _ in columns], rows, note)


def within_run(answered: Answers) -> Gallery | None:
    """The same prompts at the first and the last step; where none recurs, some of the first and of the last."""
    steps = [step for rows in answered.values() for step in rows]
    if not steps or min(steps) == max(steps):
        return None
    first, last = ({key: rows[at] for key, rows in answered.items() if at in rows} for at in (min(steps), max(steps)))
    columns = [f"step {min(steps):g}", f"step {max(steps):g}"]
    both = [key for key in first if key in last]
    if both:
        rows = [_comparison(key, [[first[key]], [last[key]]]) for key in _spread_over_tasks(both)]
        return Gallery(columns, rows, f"{len(rows)} of {count(len(both), 'prompt')} asked at both steps.")
    few = MAX_PROMPTS // 4
    rows = [_comparison(key, [[first[key]], []]) for key in list(first)[:few]]
    rows += [_comparison(key, [[], [last[key]]]) for key in list(last)[:few]]
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
    said = [_said(row) if row else None for row in samples]
    return Comparison(task, _cut(prompt), _cut(references[0]) if references else "", said)


def _said(row: dict[str, Any]) -> Said:
    rewards, reasons = row.get("rewards"), row.get("reasons")
    reasons = reasons if isinstance(reasons, dict) else {}
    marks = {text_of(row.get("task")) or "value": row["value"]} if row.get("value") is not None else {}
    marks |= rewards if isinstance(rewards, dict) else {}
    marks |= {k: v for k, v in row.items() if k not in _PLACED and not isinstance(v, dict | list)}
    words = [str(row["decoding"])] if "decoding" in row else []
    words += [f"{k} {plain(v)}" + (f" ({_cut(text_of(reasons[k]))})" if k in reasons else "") for k, v in marks.items()]
    return Said(_cut(text_of(row.get("completion"))), words)


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)" if more > 0 else text
