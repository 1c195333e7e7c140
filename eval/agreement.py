"""Figures of how well a reward model's scores agree with judged answers, each with an interval. No torch.

A row holds the scores of its answers and their lengths in tokens, and one of these verdicts:

    right   how many of the answers, the first ones, are right (a pair is two answers, the first one right)
    label   whether its one answer is good
    score   what its one answer has in the data

Every verdict becomes comparisons, each with a margin that is above 0 where the model is right: of a right answer over a
wrong one; of a labelled answer over the score 0; of two scored answers, the better one first.
"""

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conversations.answers.intervals import bootstrap_interval, mean_interval

Array = np.ndarray[Any, np.dtype[Any]]
Measure = Callable[[Array], float]  # weights of the rows [N] -> the figure; NaN where it is not defined
Row = Mapping[str, Any]
Figure = dict[str, Any]  # value, interval, n

PARTNERS = 64  # scored rows that each scored row is compared with, at most
BINS = 10  # of confidence, from 0.5 to 1
LONG = 0.3  # a correlation of scores with length that is worth a remark
GROUPS = 50  # listed by name
GROUPED_BY = {"by_source": ("source", "dataset", "subset"), "by_kind": ("kind", "category")}  # keys of meta
TIES_ID = re.compile(r"(ref|tied):(.+)")  # RewardBench 2: a question with one right answer, and its like with several


@dataclass(frozen=True)
class Comparisons:
    """row [C]: whose comparison it is. other [C]: the second row of one between scored rows, else -1. margin [C].
    length [C]: 1 where length speaks for the better answer, -1 where against it, 0 where it is equal."""

    row: Array
    other: Array
    margin: Array
    length: Array

    def weights(self, of_rows: Array) -> Array:
        """[C], from those of the rows [N]: a row counts the same however many comparisons it has."""
        counts = np.bincount(self.row, minlength=len(of_rows))
        return of_rows[self.row] * np.where(self.other < 0, 1, of_rows[self.other]) / counts[self.row]

    def where(self, kept: Array) -> "Comparisons":
        return Comparisons(self.row[kept], self.other[kept], self.margin[kept], self.length[kept])


def compare(rows: Sequence[Row]) -> Comparisons:
    """The comparisons of all rows, in their order; those of scored rows come last."""
    lengths = [row["lengths"][0] for row in rows if "label" in row]
    usual = float(np.median(lengths)) if lengths else 0.0
    found: list[tuple[int, int, float, float]] = []
    for place, row in enumerate(rows):
        scores, sizes = row["scores"], row["lengths"]
        if "label" in row:
            sign = 1 if row["label"] else -1
            found.append((place, -1, sign * scores[0], sign * (sizes[0] - usual)))
        for better in range(row.get("right", 0)):
            for worse in range(row["right"], len(scores)):
                found.append((place, -1, scores[better] - scores[worse], sizes[better] - sizes[worse]))
    found += _between(rows)
    columns = np.array(found, dtype=float).reshape(-1, 4).T
    return Comparisons(columns[0].astype(int), columns[1].astype(int), columns[2], np.sign(columns[3]))


def _between(rows: Sequence[Row]) -> list[tuple[int, int, float, float]]:
    """Scored rows with others whose target differs: with all of them where there are few, else with some."""
    scored = np.array([place for place, row in enumerate(rows) if "score" in row], dtype=int)
    scored = np.random.default_rng(0).permutation(scored)  # a file may be in the order of its scores
    target, score, size = (
        np.array([rows[i][key] if key == "score" else rows[i][key][0] for i in scored], dtype=float)
        for key in ("score", "scores", "lengths")
    )
    found: list[tuple[int, int, float, float]] = []
    for step in range(1, min(PARTNERS, len(scored) - 1) + 1):
        other = np.roll(np.arange(len(scored)), -step)
        sign = np.sign(target - target[other])
        columns = (scored, scored[other], sign * (score - score[other]), sign * (size - size[other]))
        found += [tuple(line) for line in np.stack(columns, axis=1)[sign != 0].tolist()]
    return found


# --- The figures


def accuracy(found: Comparisons) -> Measure:
    """The mean over rows of the share of their comparisons that the model gets right; equal scores are not right."""
    return lambda weights: _mean(found.margin > 0, found.weights(weights))


def length_controlled(found: Comparisons) -> Measure:
    """The accuracy where length speaks for the better answer and that where it speaks against it, which count equally:
    a model that goes by length alone gets a half. Comparisons of equal length belong to both."""
    if not found.length.any():
        return accuracy(found)
    sides = [found.where(found.length * side >= 0) for side in (1, -1)]
    if not all((side.length != 0).any() for side in sides):
        return lambda weights: np.nan
    measures = [accuracy(side) for side in sides]
    return lambda weights: float(np.mean([measure(weights) for measure in measures]))


def mean_margin(found: Comparisons) -> Measure:
    return lambda weights: _mean(found.margin, found.weights(weights))


def calibration_error(found: Comparisons) -> Measure:
    """Expected calibration error (Naeini et al. 2015): sigmoid(|margin|) is how sure the model is (Bradley-Terry)."""
    sure = 1 / (1 + np.exp(-np.abs(found.margin)))
    right = np.where(found.margin == 0, 0.5, found.margin > 0)
    place = np.minimum((2 * BINS * (sure - 0.5)).astype(int), BINS - 1)

    def measure(weights: Array) -> float:
        each = found.weights(weights)
        return float(np.abs(np.bincount(place, each * (right - sure), BINS)).sum() / each.sum())

    return measure


def auc(rows: Sequence[Row]) -> Measure:
    """The chance that an answer that is good scores higher than one that is not, both taken from all rows (the area
    under the ROC curve); equal scores count half."""
    listed = [
        (place, score, row["label"] if "label" in row else number < row["right"])
        for place, row in enumerate(rows)
        if "score" not in row
        for number, score in enumerate(row["scores"])
    ]
    row_of, scores, good = (np.array(column) for column in zip(*listed, strict=True))
    level = np.unique(scores, return_inverse=True)[1]

    def measure(weights: Array) -> float:
        up, down = (np.bincount(level, weights[row_of] * which) for which in (good, ~good.astype(bool)))
        total = up.sum() * down.sum()
        return float((up * (down.cumsum() - down / 2)).sum() / total) if total else np.nan

    return measure


def concordance(found: Comparisons) -> Measure:
    """What the area under the ROC curve is where targets are numbers (Harrell 1982); equal scores count half."""
    right = np.where(found.margin == 0, 0.5, found.margin > 0)
    return lambda weights: _mean(right, found.weights(weights))


def length_correlation(rows: Sequence[Row]) -> Measure:
    """Pearson's correlation of an answer's score with its length in tokens, over all answers."""
    listed = [
        (place, *each) for place, row in enumerate(rows) for each in zip(row["scores"], row["lengths"], strict=True)
    ]
    columns = np.array(listed, dtype=float).T
    row_of, pair = columns[0].astype(int), columns[1:]

    def measure(weights: Array) -> float:
        if np.ptp(pair, axis=1).min() == 0:
            return np.nan
        (a, both), (_, b) = np.cov(pair, aweights=weights[row_of], ddof=0)
        return float(both / np.sqrt(a * b)) if a > 0 and b > 0 else np.nan

    return measure


def best_of(row: Row) -> float:
    """RewardBench 2 (Malik et al. 2025): whether the highest score is a right answer's; of several answers with that
    score each counts its part."""
    top = [score == max(row["scores"]) for score in row["scores"]]
    return sum(top[: row["right"]]) / sum(top)


def ties(rows: Sequence[Row]) -> Measure:
    """RewardBench 2's score of ties: 30 % each for the questions with one and with several right answers, of which all
    right ones score above all wrong ones; 20 % for the latter whose right answers differ by less than they stand above
    the wrong ones, 20 % where this holds for the question with one right answer too, and 1 % for by how much."""
    named: dict[str, dict[str, int]] = {"ref": {}, "tied": {}}
    for place, row in enumerate(rows):
        if match := _ties_id(row):
            named[match[1]][match[2]] = place
    gap, spread = np.zeros(len(rows)), np.zeros(len(rows))
    for place in (place for places in named.values() for place in places.values()):
        good, bad = rows[place]["scores"][: rows[place]["right"]], rows[place]["scores"][rows[place]["right"] :]
        gap[place], spread[place] = min(good) - max(bad), max(good) - min(good)
    ref, tied = (np.array([*places.values()], dtype=int) for places in named.values())
    both = [key for key in named["tied"] if key in named["ref"]]
    one, several = (np.array([named[name][key] for key in both], dtype=int) for name in ("ref", "tied"))
    least = np.minimum(gap[one], gap[several])
    with np.errstate(divide="ignore", invalid="ignore"):
        by_how_much = np.nan_to_num(np.tanh(least / spread[several] - 1), nan=0.0)

    def measure(weights: Array) -> float:
        parts = (
            (0.3, gap[tied] > 0, tied),
            (0.3, gap[ref] > 0, ref),
            (0.2, gap[several] > spread[several], several),
            (0.2, least > spread[several], several),
            (0.01, by_how_much, several),
        )
        return sum(share * _mean(values, weights[places]) for share, values, places in parts)

    return measure


def _ties_id(row: Row) -> re.Match[str] | None:
    return TIES_ID.fullmatch(str((row.get("meta") or {}).get("id"))) if "right" in row else None


def _mean(values: Array, weights: Array) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else np.nan


# --- All of them


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """{"n", "value": the accuracy, "value_interval", "details": {name: {value, interval, n}}}, and "by_source" and
    "by_kind" where rows have a key of `GROUPED_BY` in meta. A figure that these rows do not define is left out; one
    that they do, but which cannot be computed (lengths that are all equal), is None. Intervals are of 95 %; rows with
    the same prompt are taken together for them."""
    found, prompts = compare(rows), prompts_of(rows)
    everything = np.ones(len(rows), dtype=bool)
    right = _accuracy(found, everything, prompts)
    details = {name: _figure(measure, prompts, n) for name, (measure, n) in _measures(rows, found).items()}
    groups = {name: _grouped(rows, found, prompts, keys) for name, keys in GROUPED_BY.items()}
    return {
        "n": len(rows),
        "value": right["value"],
        "value_interval": right["interval"],
        "details": {**_bests(rows, prompts), **details},
        **{name: group for name, group in groups.items() if group},
    }


def prompts_of(rows: Sequence[Row]) -> list[Hashable]:
    """What each row is a case of: its prompt, or itself where none is stated."""
    return [row.get("prompt", place) for place, row in enumerate(rows)]


def remark(figures: Mapping[str, Any]) -> str:
    """What the summary of an evaluation says beside its figures; empty where there is nothing."""
    value = figures.get("details", {}).get("length_correlation", {}).get("value")
    if value is None or abs(value) <= LONG:
        return ""
    return f"; scores {'rise' if value > 0 else 'fall'} with length (correlation {value:.2f})"


def _measures(rows: Sequence[Row], found: Comparisons) -> dict[str, tuple[Measure, int]]:
    """Figures that are no mean over rows, and from how many rows they are."""
    judged = sum("score" not in row for row in rows)
    measures = {
        "length_controlled": (length_controlled(found), len(rows)),
        "auc": (auc(rows) if judged else concordance(found), judged or len(rows)),
        "mean_margin": (mean_margin(found), len(rows)),
        "length_correlation": (length_correlation(rows), len(rows)),
    }
    if judged:
        measures["calibration_error"] = (calibration_error(found.where(found.other < 0)), judged)
    kinds = {match[1] for row in rows if (match := _ties_id(row))}
    if kinds == {"ref", "tied"}:
        measures["ties"] = (ties(rows), sum(_ties_id(row) is not None for row in rows))
    return measures


def _bests(rows: Sequence[Row], prompts: Sequence[Hashable]) -> dict[str, Figure]:
    """best_of_4 where there are questions with four answers, and so on."""
    sizes: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if len(row["scores"]) > 2 and not _ties_id(row):
            sizes.setdefault(len(row["scores"]), []).append(place)
    return {
        f"best_of_{size}": _share([best_of(rows[place]) for place in places], [prompts[place] for place in places])
        for size, places in sorted(sizes.items())
    }


def _grouped(
    rows: Sequence[Row], found: Comparisons, prompts: Sequence[Hashable], keys: Sequence[str]
) -> dict[str, Figure]:
    """The accuracy in each group, by the first of these keys that a row's meta has."""
    metas = [row.get("meta") or {} for row in rows]
    names = [next((str(meta[key]) for key in keys if meta.get(key) is not None), "") for meta in metas]
    if not any(names):
        return {}
    counts = {name: names.count(name) for name in sorted(set(names))}
    listed = {name: name or "not stated" for name in sorted(counts, key=lambda name: -counts[name])[:GROUPS]}
    groups = np.array([listed.get(name, "all others") for name in names])
    of_groups = {str(group): groups == group for group in dict.fromkeys(sorted(groups))}
    return {group: _accuracy(found, which, prompts) for group, which in of_groups.items()}


def _accuracy(found: Comparisons, which: Array, prompts: Sequence[Hashable]) -> Figure:
    """The accuracy on these rows. Comparisons between two rows leave no value for each row, so that its interval is a
    bootstrap's then."""
    measure, n = accuracy(found), int(which.sum())
    if (found.other >= 0).any():
        return _figure(lambda weights: measure(weights * which), prompts, n)
    right, total = (np.bincount(found.row, values, len(which)) for values in (found.margin > 0, None))
    places = np.flatnonzero(which & (total > 0)).tolist()
    return _share((right[places] / total[places]).tolist(), [prompts[place] for place in places])


def _share(values: Sequence[float], prompts: Sequence[Hashable]) -> Figure:
    """The mean of values from 0 to 1."""
    if not values:
        return {"value": None, "interval": None, "n": 0}
    return {"value": float(np.mean(values)), "interval": [*mean_interval(values, prompts)], "n": len(values)}


def _figure(measure: Measure, prompts: Sequence[Hashable], n: int) -> Figure:
    """Any figure, with the interval of a bootstrap over prompts."""
    value = measure(np.ones(len(prompts)))
    if np.isnan(value):
        return {"value": None, "interval": None, "n": n}
    return {"value": value, "interval": [*bootstrap_interval(measure, prompts)], "n": n}
