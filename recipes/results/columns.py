"""Evaluation metrics as table columns: headings, shares with intervals, sample sizes, share of truncated answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from conversations.answers.intervals import wilson
from recipes.results.layout import Cell, plain_cell
from recipes.results.words import number, short

Figures = Mapping[str, Any]  # flat figures of one evaluation: exact_match, exact_match_t1, n, ...

TRUNCATED = "_truncated"  # suffix of the share of answers truncated by max_new_tokens
VERSION = "version"  # of the form of results.json
CONTAMINATED = "_contaminated"  # suffix of the number of rows that training data contain
UNREAD = "_unread"  # suffix of the share of answers in which nothing was found to judge
POINTS = "_points"  # suffix of a mean of points or scores, which are not shares wherever they lie
_OPEN_ENDED = (POINTS, "_win_rate")  # suffixes of figures that do not say how answers are decoded
FAILED = "_error"  # suffix of the reason why a task could not be measured
INTERVAL = "_interval"  # suffix of a share's 95 % interval
SAMPLED = re.compile(r"_t([0-9.]+)$")


@dataclass(frozen=True)
class Column:
    """A metric of several evaluations. kind: a key of FORMATS; sizes: the distinct numbers of prompts behind it."""

    key: str
    title: str
    kind: str
    decoding: str
    sizes: frozenset[float | None]

    @property
    def heading(self) -> Cell:
        stated = len(self.sizes) == 1 and (self.kind == SHARE or self.sizes != {None})
        size = _size(next(iter(self.sizes))) if stated else ()
        return Cell(self.title, (*((self.decoding,) if self.decoding else ()), *size))

    def cell(self, entry: Figures) -> Cell:
        size = _size(sample_size(entry, self.key)) if len(self.sizes) > 1 and self.key in entry else ()
        beside = {
            word: number(entry.get(self.key + suffix)) for word, suffix in (("cut", TRUNCATED), ("unread", UNREAD))
        }
        shares = [f"{100 * share:.1f} % {word}" for word, share in beside.items() if share]
        seen = number(entry.get(SAMPLED.sub("", self.key) + CONTAMINATED))
        shares += [f"{seen:,.0f} in training data"] if seen else []
        cell = FORMATS[self.kind](entry, self.key)
        return replace(cell, minor=(*cell.minor, *size, *shares))


def columns_of(evaluations: Sequence[Figures], tasks: Mapping[str, str]) -> list[Column]:
    """The columns of evaluations: shares of titled tasks in order, then other shares, then other metrics."""
    keys = dict.fromkeys(key for entry in evaluations for key in entry)
    nested = {key for entry in evaluations for key, value in entry.items() if isinstance(value, dict)}  # own tables
    keys_shown = [key for key in keys if not _is_size(key) and not _is_beside(key, keys)]
    keys_shown = [key for key in keys_shown if key not in nested and not key.endswith(FAILED)]
    columns = [_column(key, [entry for entry in evaluations if key in entry], tasks) for key in keys_shown]
    order = [*tasks]

    def place(column: Column) -> tuple[bool, int]:
        task = SAMPLED.sub("", column.key)
        return column.kind != SHARE, order.index(task) if task in order else len(order)

    return sorted(columns, key=place)


def _column(key: str, evaluations: Sequence[Figures], tasks: Mapping[str, str]) -> Column:
    """The column of a metric that all of these evaluations have."""
    task, sampled = SAMPLED.sub("", key), SAMPLED.search(key)
    generated = not key.endswith(_OPEN_ENDED) and any(
        other == task + TRUNCATED or SAMPLED.sub("", other) == task != other for entry in evaluations for other in entry
    )
    decoding = f"T = {sampled[1]}" if sampled else "greedy" if generated else ""
    sizes = frozenset(sample_size(entry, key) for entry in evaluations)
    values = [value for entry in evaluations if (value := number(entry.get(key))) is not None]
    # A metric without a title counts as a share if its n is known and it lies in [0, 1].
    in_range = sizes != {None} and all(0 <= value <= 1 for value in values)
    is_share = not key.endswith(POINTS) and (task in tasks or in_range)
    kind = LOSS if task.endswith(LOSS) else SHARE if is_share else OTHER
    return Column(key, heading_of(task, tasks), kind, decoding, sizes)


def share_cell(entry: Figures, key: str) -> Cell:
    """A share in per cent with its interval. An invalid value is shown unchanged and marked."""
    share = number(entry.get(key))
    if share is None:
        return Cell("–") if entry.get(key) is None else Cell(str(entry[key]), ("not a number",), "bad")
    if not 0 <= share <= 1:
        return Cell(short(share) if math.isfinite(share) else str(share), ("not between 0 and 1",), "bad")
    interval = _interval_of(entry, key, share)
    low, high = interval or (share, share)
    minor = (f"{100 * low:.1f} to {100 * high:.1f}",) if interval else ()
    return Cell(f"{100 * share:.1f} %", minor, bar=(low, share, high))


def _interval_of(entry: Figures, key: str, share: float) -> tuple[float, float] | None:
    """The interval that the evaluation states; of figures without one, that of a share of n, or None without n."""
    stated = entry.get(key + INTERVAL)
    bounds = [number(bound) for bound in stated] if isinstance(stated, list) else []
    match bounds:
        case [float(low), float(high)] if low <= share <= high:
            return low, high
    n = sample_size(entry, key)
    return wilson(share, n) if n else None


def _stated_interval(entry: Figures, key: str, shown: Callable[[float], str] = short) -> tuple[str, ...]:
    """The interval that the evaluation states, as text; none of figures without one."""
    stated = entry.get(key + INTERVAL)
    bounds = [bound for value in stated if (bound := number(value)) is not None] if isinstance(stated, list) else []
    return (" to ".join(map(shown, bounds)),) if len(bounds) == 2 else ()


def _loss_cell(entry: Figures, key: str) -> Cell:
    loss = number(entry.get(key))
    if loss is None or not math.isfinite(loss):
        return plain_cell(entry.get(key))
    return Cell(f"{loss:.3f} nats", _stated_interval(entry, key, "{:.3f}".format))


SHARE, LOSS, OTHER = "share", "loss", "other"
FORMATS: dict[str, Callable[[Figures, str], Cell]] = {
    SHARE: share_cell,
    LOSS: _loss_cell,
    OTHER: lambda entry, key: replace(plain_cell(entry.get(key)), minor=_stated_interval(entry, key)),
}


def sample_size(entry: Figures, key: str) -> float | None:
    """The number of prompts behind `key`: `TASK_n` or `n_TASK`; plain `n` belongs to the first task."""
    task = _task(key.removesuffix(TRUNCATED))
    names = [f"{task}_n", f"n_{task}", f"n_{task.removeprefix('refusal_')}"]
    first = next((_task(metric) for metric in entry if not _is_size(metric) and not _is_beside(metric)), None)
    names += ["n"] if task == first else []
    stated = [n for name in names if (n := number(entry.get(name))) is not None and 0 < n < math.inf]
    return stated[0] if stated else None


def _task(key: str) -> str:
    """The task whose figure a key is."""
    return SAMPLED.sub("", reduce(str.removesuffix, _OPEN_ENDED, key))


def _is_size(key: str) -> bool:
    return key in ("n", VERSION) or key.startswith("n_") or key.endswith("_n")


def is_cut(key: str) -> bool:
    return key.endswith(TRUNCATED)


def failures(entry: Figures) -> dict[str, str]:
    """The tasks that could not be measured, with the reasons."""
    return {key.removesuffix(FAILED): str(why) for key, why in entry.items() if key.endswith(FAILED)}


def _is_beside(key: str, keys: Iterable[str] | None = None) -> bool:
    """Whether a key says more of another figure: one of these keys (at any temperature), if they are given."""
    suffixes = (TRUNCATED, UNREAD, CONTAMINATED, INTERVAL)
    figure = next((key.removesuffix(suffix) for suffix in suffixes if key.endswith(suffix)), None)
    return figure is not None and (keys is None or any(figure in (other, SAMPLED.sub("", other)) for other in keys))


def _size(n: float | None) -> tuple[str]:
    return (f"n = {n:,.0f}" if n else "n not stated",)


def heading_of(task: str, tasks: Mapping[str, str]) -> str:
    """The task's title, or its name in words."""
    return tasks.get(task) or (task[:1].upper() + task[1:]).replace("_", " ")
