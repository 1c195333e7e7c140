"""What the models answered: the same prompts side by side across runs, and early versus late within one run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from recipes.report.flags import WARNINGS, warnings_of
from recipes.results.words import count, number, plain

MAX_PROMPTS = 24
MAX_CHARACTERS = 1200
TOTAL = "reward"  # of a sample: the weighted sum of its rewards
# Keys of a sample that have a place of their own; any other plain value is listed below the completion.
_PLACED = {
    "step",
    "prompt",
    "rendered",
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
    "truncated",
}

Key = tuple[str, str]  # task, prompt
Answers = dict[Key, dict[float, dict[str, Any]]]  # of each prompt, the sample at each step, in their order


@dataclass(frozen=True)
class Completion:
    """One completion: its text, what it scored, and warnings about it."""

    text: str
    marks: Sequence[str]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """One prompt and the completion in each column (None: there is none). `warnings`: those of the last column."""

    task: str
    prompt: str
    reference: str
    completions: Sequence[Completion | None]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Gallery:
    """Prompts (rows) by models or steps (columns), those with warnings first. `note` says what was chosen from how
    many."""

    columns: Sequence[str]
    rows: Sequence[Comparison]
    note: str

    @cached_property
    def filters(self) -> list[list[tuple[str, str, int]]]:
        """What the rows can be filtered by: groups of (CSS class of the rows, label, number of rows)."""
        by_class = Counter(name for row in self.rows for name in self.classes(row))
        labels = {"warned": "with a warning", **{f"w{place}": label for place, label in enumerate(WARNINGS)}}
        tasks = {f"t{place}": label for place, label in enumerate(self._tasks)}
        groups = [
            [(name, label, by_class[name]) for name, label in of.items() if name in by_class] for of in (labels, tasks)
        ]
        return [group for group in groups if len(group) > 1 or (group and group[0][2] < len(self.rows))]

    def classes(self, row: Comparison) -> list[str]:
        """The CSS classes of a row: one for its task, one for each warning, one for having any."""
        warned = [f"w{place}" for place, label in enumerate(WARNINGS) if label in row.warnings]
        return [f"t{self._tasks.index(row.task)}", *warned, *(["warned"] if warned else [])]

    @cached_property
    def _tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))


def _gallery(columns: Sequence[str], rows: Sequence[Comparison], note: str) -> Gallery:
    return Gallery(columns, sorted(rows, key=lambda row: not row.warnings), note)


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
    latest = {key: [[*run_answers.get(key, {}).values()][-1:] for _, run_answers in columns] for key in shared}
    warned = {key for key, samples in latest.items() if _warned(samples)}
    rows = [_comparison(key, latest[key]) for key in _spread_over_tasks(shared, warned)]
    note = (
        f"{len(rows)} of {count(len(shared), 'prompt')} that {most} runs answered, the first of each task; "
        f"{sum(bool(row.warnings) for row in rows)} from the {len(warned):,} with a warning about the last answer."
    )
    return _gallery([title for title, _ in columns], rows, note)


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
        pairs = {key: [[first[key]], [last[key]]] for key in common}
        warned = {key for key, samples in pairs.items() if _warned(samples)}
        rows = [_comparison(key, pairs[key]) for key in _spread_over_tasks(common, warned)]
        return _gallery(columns, rows, f"{len(rows)} of {count(len(common), 'prompt')} asked at both steps.")
    per_step = MAX_PROMPTS // 4
    rows = [_comparison(key, [[first[key]], []]) for key in list(first)[:per_step]]
    rows += [_comparison(key, [[], [last[key]]]) for key in list(last)[:per_step]]
    return _gallery(columns, rows, "No prompt was asked at both steps; these are the first prompts of each.")


def of_one_step(answers_of_run: Answers) -> Gallery | None:
    """Some answers of a run that has one step, as an evaluation has."""
    if not answers_of_run:
        return None
    latest = {key: [[*rows.values()][-1:]] for key, rows in answers_of_run.items()}
    warned = {key for key, samples in latest.items() if _warned(samples)}
    rows = [_comparison(key, latest[key]) for key in _spread_over_tasks([*latest], warned)]
    shown = sum(bool(row.warnings) for row in rows)
    note = (
        f"{len(rows)} of {count(len(latest), 'prompt')}, the first of each task; "
        f"{shown} from the {len(warned):,} with a warning."
    )
    return _gallery(["answer"], rows, note)


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
    return _gallery(["highest reward", "lowest reward"], rows, note)


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


def _warned(columns: Sequence[Sequence[dict[str, Any]]]) -> bool:
    return bool(warnings_of([rows[0] if rows else None for rows in columns]))


def _spread_over_tasks(keys: Sequence[Key], warned: Container[Key] = ()) -> list[Key]:
    """MAX_PROMPTS keys, taken in turn from the tasks, at most half of them `warned` where there are others; grouped by
    task again."""
    with_warning, others = ([key for key in keys if (key in warned) == wanted] for wanted in (True, False))
    some = _in_turn(with_warning)[: max(MAX_PROMPTS // 2, MAX_PROMPTS - len(others))]
    chosen = {*some, *_in_turn(others)[: MAX_PROMPTS - len(some)]}
    tasks = list(dict.fromkeys(task for task, _ in keys))
    return sorted((key for key in keys if key in chosen), key=lambda key: tasks.index(key[0]))


def _in_turn(keys: Sequence[Key]) -> list[Key]:
    """The keys, one of each task after the other."""
    by_task: dict[str, list[Key]] = {}
    for key in keys:
        by_task.setdefault(key[0], []).append(key)
    return [key for turn in zip_longest(*by_task.values()) for key in turn if key is not None]


def _comparison(key: Key, columns: Sequence[Sequence[dict[str, Any]]]) -> Comparison:
    task, prompt = key
    samples = [rows[0] if rows else None for rows in columns]
    references = [text_of(row["reference"]) for row in samples if row and row.get("reference") is not None]
    completions = [_completion(row) if row else None for row in samples]
    reference = _cut(references[0]) if references else ""
    return Comparison(task, _end_of(prompt), reference, completions, warnings_of(samples))


def _completion(row: dict[str, Any]) -> Completion:
    rewards, reasons = row.get("rewards"), row.get("reasons")
    reasons = reasons if isinstance(reasons, dict) else {}
    marks = {text_of(row.get("task")) or "value": row["value"]} if row.get("value") is not None else {}
    marks |= rewards if isinstance(rewards, dict) else {}
    marks |= {k: v for k, v in row.items() if k not in _PLACED and v is not None and not isinstance(v, dict | list)}
    words = [str(row["decoding"])] if "decoding" in row else []
    words += [f"{k} {plain(v)}" + (f" ({_cut(text_of(reasons[k]))})" if k in reasons else "") for k, v in marks.items()]
    return Completion(_cut(text_of(row.get("completion"))), words, warnings_of([row]))


def _end_of(prompt: str) -> str:
    """The end of a long prompt: examples come before what is asked."""
    more = len(prompt) - MAX_CHARACTERS
    return f"({more:,} more characters) … {prompt[more:]}" if more > 0 else prompt


def _cut(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({more:,} more characters)" if more > 0 else text
