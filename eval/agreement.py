"""Measures how well a reward model's scores agree with judged answers, with confidence intervals. Imports no torch.

A row holds the scores of its answers, their lengths in tokens, and one of these verdicts:

    right   number of right answers, which come first (a pair has two answers, of which the first is right)
    label   whether its only answer is good
    score   the score of its only answer in the data

Verdicts are turned into comparisons, each with a margin that is positive if the model is right: a right answer against
a wrong one, a labelled answer against the score 0, or two scored answers against each other, the better one first.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.figures import Figure, Measure, measured, share

Array = np.ndarray[Any, np.dtype[Any]]
Row = Mapping[str, Any]

PARTNERS = 64  # maximum number of scored rows that each scored row is compared with
BINS = 10  # of confidence, from 0.5 to 1
LONG = 0.3  # a correlation between score and length above which the summary mentions it
GROUPS = 50  # maximum number of groups listed by name
GROUPED_BY = {"by_source": ("source", "dataset", "subset"), "by_kind": ("kind", "category")}  # keys of meta
# RewardBench 2: ids of a question with one right answer (ref) and of its variant with several (tied)
TIES_ID = re.compile(r"(ref|tied):(.+)")


@dataclass(frozen=True)
class Comparisons:
    """C comparisons. row [C]: the row of each. other [C]: the second row if it compares two scored rows, else -1.
    margin [C]: positive if the model is right. length [C]: 1 if the better answer is longer, -1 if shorter, 0 if equal.
    """

    row: Array
    other: Array
    margin: Array
    length: Array

    def weights(self, of_rows: Array) -> Array:
        """The weights [C] of the comparisons, from those of the rows [N]: a row counts the same regardless of its
        number of comparisons."""
        counts = np.bincount(self.row, minlength=len(of_rows))
        return of_rows[self.row] * np.where(self.other < 0, 1, of_rows[self.other]) / counts[self.row]

    def where(self, mask: Array) -> "Comparisons":
        return Comparisons(self.row[mask], self.other[mask], self.margin[mask], self.length[mask])


def compare(rows: Sequence[Row]) -> Comparisons:
    """The comparisons of all rows, in order; those between scored rows come last."""
    lengths = [row["lengths"][0] for row in rows if "label" in row]
    median = float(np.median(lengths)) if lengths else 0.0
    comparisons: list[tuple[int, int, float, float]] = []
    for place, row in enumerate(rows):
        scores, sizes = row["scores"], row["lengths"]
        if "label" in row:
            sign = 1 if row["label"] else -1
            comparisons.append((place, -1, sign * scores[0], sign * (sizes[0] - median)))
        for better in range(row.get("right", 0)):
            for worse in range(row["right"], len(scores)):
                comparisons.append((place, -1, scores[better] - scores[worse], sizes[better] - sizes[worse]))
    comparisons += _between(rows)
    columns = np.array(comparisons, dtype=float).reshape(-1, 4).T
    return Comparisons(columns[0].astype(int), columns[1].astype(int), columns[2], np.sign(columns[3]))


def _between(rows: Sequence[Row]) -> list[tuple[int, int, float, float]]:
    """Comparisons of each scored row with up to PARTNERS others whose target differs."""
    scored = np.array([place for place, row in enumerate(rows) if "score" in row], dtype=int)
    scored = np.random.default_rng(0).permutation(scored)  # the file may be sorted by score
    target, score, size = (
        np.array([rows[i][key] if key == "score" else rows[i][key][0] for i in scored], dtype=float)
        for key in ("score", "scores", "lengths")
    )
    comparisons: list[tuple[int, int, float, float]] = []
    for step in range(1, min(PARTNERS, len(scored) - 1) + 1):
        other = np.roll(np.arange(len(scored)), -step)
        sign = np.sign(target - target[other])
        columns = (scored, scored[other], sign * (score - score[other]), sign * (size - size[other]))
        comparisons += [tuple(line) for line in np.stack(columns, axis=1)[sign != 0].tolist()]
    return comparisons


# --- The measures


def accuracy(comparisons: Comparisons) -> Measure:
    """The mean over rows of the fraction of their comparisons that the model gets right; equal scores count as
    wrong."""
    return lambda weights: _mean(comparisons.margin > 0, comparisons.weights(weights))


def length_controlled(comparisons: Comparisons) -> Measure:
    """The mean of two accuracies: on comparisons whose better answer is longer, and on those where it is shorter. A
    model that judges by length alone gets one half. Comparisons of equal length belong to both."""
    if not comparisons.length.any():
        return accuracy(comparisons)
    sides = [comparisons.where(comparisons.length * side >= 0) for side in (1, -1)]
    if not all((side.length != 0).any() for side in sides):
        return lambda weights: np.nan
    measures = [accuracy(side) for side in sides]
    return lambda weights: float(np.mean([measure(weights) for measure in measures]))


def mean_margin(comparisons: Comparisons) -> Measure:
    """The mean margin of the comparisons, in units of the score."""
    return lambda weights: _mean(comparisons.margin, comparisons.weights(weights))


def calibration_error(comparisons: Comparisons) -> Measure:
    """Expected calibration error (Naeini et al. 2015), with sigmoid(|margin|) as confidence (Bradley-Terry)."""
    confidence = 1 / (1 + np.exp(-np.abs(comparisons.margin)))
    right = np.where(comparisons.margin == 0, 0.5, comparisons.margin > 0)
    bin_of = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)

    def measure(weights: Array) -> float:
        row_weights = comparisons.weights(weights)
        return float(np.abs(np.bincount(bin_of, row_weights * (right - confidence), BINS)).sum() / row_weights.sum())

    return measure


def auc(rows: Sequence[Row]) -> Measure:
    """Area under the ROC curve: the probability that a good answer scores higher than a bad one, both drawn from all
    rows; equal scores count half."""
    listed = [
        (place, score, row["label"] if "label" in row else number < row["right"])
        for place, row in enumerate(rows)
        if "score" not in row
        for number, score in enumerate(row["scores"])
    ]
    row_of, scores, good = (np.array(column) for column in zip(*listed, strict=True))
    level = np.unique(scores, return_inverse=True)[1]

    def measure(weights: Array) -> float:
        up, down = (np.bincount(level, weights[row_of] * kind) for kind in (good, ~good.astype(bool)))
        total = up.sum() * down.sum()
        return float((up * (down.cumsum() - down / 2)).sum() / total) if total else np.nan

    return measure


def concordance(comparisons: Comparisons) -> Measure:
    """The concordance index (Harrell 1982), which generalises the area under the ROC curve to numeric targets; equal
    scores count half."""
    right = np.where(comparisons.margin == 0, 0.5, comparisons.margin > 0)
    return lambda weights: _mean(right, comparisons.weights(weights))


def length_correlation(rows: Sequence[Row]) -> Measure:
    """Pearson correlation between an answer's score and its length in tokens, over all answers."""
    listed = [
        (place, *answer) for place, row in enumerate(rows) for answer in zip(row["scores"], row["lengths"], strict=True)
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
    """RewardBench 2 (Malik et al. 2025): 1 if the highest score belongs to a right answer, else 0; if several answers
    share the highest score, the fraction of these that is right."""
    top = [score == max(row["scores"]) for score in row["scores"]]
    return sum(top[: row["right"]]) / sum(top)


def ties(rows: Sequence[Row]) -> Measure:
    """The ties score of RewardBench 2, for questions with one right answer (ref) and variants with several (tied).

    It weighs 30 % each the fractions of tied and of ref questions whose right answers all score above all wrong ones;
    20 % the fraction of tied questions whose right answers differ by less than their gap to the wrong ones; 20 % the
    fraction for which that also holds with the smaller gap of the two variants; and 1 % by how large the gap is.
    """
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
    of_ref, of_tied = (np.array([named[name][key] for key in both], dtype=int) for name in ("ref", "tied"))
    least = np.minimum(gap[of_ref], gap[of_tied])
    with np.errstate(divide="ignore", invalid="ignore"):
        by_how_much = np.nan_to_num(np.tanh(least / spread[of_tied] - 1), nan=0.0)

    def measure(weights: Array) -> float:
        parts = (
            (0.3, gap[tied] > 0, tied),
            (0.3, gap[ref] > 0, ref),
            (0.2, gap[of_tied] > spread[of_tied], of_tied),
            (0.2, least > spread[of_tied], of_tied),
            (0.01, by_how_much, of_tied),
        )
        return sum(share * _mean(values, weights[places]) for share, values, places in parts)

    return measure


def _ties_id(row: Row) -> re.Match[str] | None:
    return TIES_ID.fullmatch(str((row.get("meta") or {}).get("id"))) if "right" in row else None


def _mean(values: Array, weights: Array) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else np.nan


# --- All figures


def agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """{"n", "value": the accuracy, "value_interval", "details": {name: {value, interval, n}}}, plus "by_source" and
    "by_kind" if rows have the keys of `GROUPED_BY` in meta.

    A figure that does not apply to these rows is left out; one that applies but cannot be computed (for example because
    all lengths are equal) is None. Intervals are 95 % confidence intervals, which treat rows with the same prompt as
    one cluster.
    """
    comparisons, prompts = compare(rows), prompts_of(rows)
    everything = np.ones(len(rows), dtype=bool)
    right = _accuracy(comparisons, everything, prompts)
    details = {name: measured(measure, prompts, n) for name, (measure, n) in _measures(rows, comparisons).items()}
    groups = {name: _grouped(rows, comparisons, prompts, keys) for name, keys in GROUPED_BY.items()}
    return {
        "n": len(rows),
        "value": right["value"],
        "value_interval": right["interval"],
        "details": {**_bests(rows, prompts), **details},
        **{name: group for name, group in groups.items() if group},
    }


def prompts_of(rows: Sequence[Row]) -> list[Hashable]:
    """The cluster of each row: its prompt, or the row's own number if it has none."""
    return [row.get("prompt", place) for place, row in enumerate(rows)]


def remark(figures: Mapping[str, Any]) -> str:
    """A warning to append to an evaluation's summary line if scores correlate with length, or an empty string."""
    value = figures.get("details", {}).get("length_correlation", {}).get("value")
    if value is None or abs(value) <= LONG:
        return ""
    return f"; scores {'rise' if value > 0 else 'fall'} with length (correlation {value:.2f})"


def _measures(rows: Sequence[Row], comparisons: Comparisons) -> dict[str, tuple[Measure, int]]:
    """The measures that are not means over rows, and the number of rows that each is computed from."""
    judged = sum("score" not in row for row in rows)
    measures = {
        "length_controlled": (length_controlled(comparisons), len(rows)),
        "auc": (auc(rows) if judged else concordance(comparisons), judged or len(rows)),
        "mean_margin": (mean_margin(comparisons), len(rows)),
        "length_correlation": (length_correlation(rows), len(rows)),
    }
    if judged:
        measures["calibration_error"] = (calibration_error(comparisons.where(comparisons.other < 0)), judged)
    kinds = {match[1] for row in rows if (match := _ties_id(row))}
    if kinds == {"ref", "tied"}:
        measures["ties"] = (ties(rows), sum(_ties_id(row) is not None for row in rows))
    return measures


def _bests(rows: Sequence[Row], prompts: Sequence[Hashable]) -> dict[str, Figure]:
    """best_of_4 if there are questions with four answers, and so on."""
    sizes: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        if len(row["scores"]) > 2 and not _ties_id(row):
            sizes.setdefault(len(row["scores"]), []).append(place)
    return {
        f"best_of_{size}": share([best_of(rows[place]) for place in places], [prompts[place] for place in places])
        for size, places in sorted(sizes.items())
    }


def _grouped(
    rows: Sequence[Row], comparisons: Comparisons, prompts: Sequence[Hashable], keys: Sequence[str]
) -> dict[str, Figure]:
    """The accuracy in each group; the group of a row is the value of the first of these keys in its meta."""
    metas = [row.get("meta") or {} for row in rows]
    names = [next((str(meta[key]) for key in keys if meta.get(key) is not None), "") for meta in metas]
    if not any(names):
        return {}
    counts = {name: names.count(name) for name in sorted(set(names))}
    listed = {name: name or "not stated" for name in sorted(counts, key=lambda name: -counts[name])[:GROUPS]}
    groups = np.array([listed.get(name, "all others") for name in names])
    members = {str(group): groups == group for group in dict.fromkeys(sorted(groups))}
    return {group: _accuracy(comparisons, inside, prompts) for group, inside in members.items()}


def _accuracy(comparisons: Comparisons, included: Array, prompts: Sequence[Hashable]) -> Figure:
    """The accuracy on the rows in the mask `included`. With comparisons between two rows there is no value per row, so
    the interval is then a bootstrap interval."""
    measure, n = accuracy(comparisons), int(included.sum())
    if (comparisons.other >= 0).any():
        return measured(lambda weights: measure(weights * included), prompts, n)
    right, total = (np.bincount(comparisons.row, values, len(included)) for values in (comparisons.margin > 0, None))
    places = np.flatnonzero(included & (total > 0)).tolist()
    return share((right[places] / total[places]).tolist(), [prompts[place] for place in places])
