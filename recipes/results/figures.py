"""Evaluation metrics: flat names, the results of a chain, and paired comparisons."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from conversations.answers.intervals import difference_interval
from conversations.run_files import SAMPLES
from recipes.results.columns import INTERVAL, LOSS, TRUNCATED, UNREAD

RESULTS_VERSION = 1  # of an evaluation's results.json (docs/results.schema.json)
Figures = dict[str, Any]
Metrics = Mapping[str, Mapping[str, Any]]

# Suffix added to a task's name for each value that eval.stage.evaluate returns.
_SUFFIX = {
    "greedy": "",
    "value": "",
    "greedy_truncated": TRUNCATED,
    "greedy_unread": UNREAD,
    "greedy_interval": INTERVAL,
    "value_interval": INTERVAL,
}


class Outcome(NamedTuple):
    """The outcome of one row. value: 1.0 or 0.0, or a loss in nats per token, of several answers their mean; weight:
    1.0, or a loss's tokens. prompt: rows with the same one depend on one another; None for a row of its own."""

    value: float
    weight: float = 1.0
    prompt: str | None = None


def figures(metrics: Metrics) -> Figures:
    """Flatten the metrics of one evaluation: `exact_match`, `exact_match_t1`, `n`, ...

    `n` belongs to the first task, `TASK_n` to the others. Figures that are listed by name stay nested, as
    `TASK_details` and the like.
    """
    flat: Figures = {}
    for index, (task, values) in enumerate(metrics.items()):
        for name, value in values.items():
            if name != "n":
                own = task.endswith(LOSS) and name.startswith(LOSS)  # such a task needs no second "loss"
                suffix = name.removeprefix(LOSS) if own else _SUFFIX.get(name, f"_{name}")
                flat[task + suffix] = value
        flat["n" if index == 0 else f"{task}_n"] = values["n"]
    return flat


def chain_results(
    seed: int, evaluations: Mapping[str, Metrics], comparisons: Mapping[str, Any], seconds: float, peak_gb: float
) -> dict[str, Any]:
    """The contents of a chain's results.json.

    Args:
        evaluations: metrics by their place in it, such as `stages.sft` or `reward_models.helpful`.
        comparisons: paired comparisons by name.
    """
    results: dict[str, Any] = {"seed": seed, "stages": {}, "reward_models": {}}
    for place, metrics in evaluations.items():
        section, _, name = place.partition(".")
        results[section].setdefault(name, {}).update(figures(metrics))
    results.update(comparisons)
    results["seconds"] = round(seconds, 1)
    results["peak_memory_gb"] = round(peak_gb, 3)
    return results


def paired(before: Mapping[Any, Outcome], after: Mapping[Any, Outcome]) -> dict[str, float | int]:
    """The mean change over the prompts common to both evaluations, with its standard error.

    Pairing removes the variance due to the prompts' difficulty: with d = after - before and weights w, the mean is
    sum(w d) / sum(w), and its variance n / (n - 1) * sum(w^2 (d - mean)^2) / sum(w)^2, as for any ratio estimator
    (Cochran 1977, chapter 6); with equal weights this is var(d) / n.
    """
    differences = [(after[key].value - before[key].value, before[key].weight) for key in before if key in after]
    n, total = len(differences), sum(weight for _, weight in differences)
    if total == 0:
        return {"difference": math.nan, "standard_error": math.nan, "n": n}
    mean = sum(weight * change for change, weight in differences) / total
    squares = sum((weight * (change - mean)) ** 2 for change, weight in differences)
    error = math.sqrt(squares * n / max(1, n - 1)) / total
    return {"difference": round(mean, 5), "standard_error": round(error, 5), "n": n}


def compared(before: Mapping[Any, Outcome], after: Mapping[Any, Outcome], points: bool = False) -> dict[str, Any]:
    """The mean change over the rows common to both evaluations, its 95 % interval, clustered by prompt, whether that
    leaves zero (`differs`), and whether the values are shares: those from 0 to 1, unless they are points."""
    common = [key for key in before if key in after]
    if not common:
        return {"difference": math.nan, "interval": [math.nan, math.nan], "differs": False, "n": 0}
    differences = [after[key].value - before[key].value for key in common]
    weights = [before[key].weight for key in common]
    prompts = [key if before[key].prompt is None else before[key].prompt for key in common]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)
    low, high = difference_interval(differences, weights, prompts)
    shares = not points and all(0 <= side[key].value <= 1 for side in (before, after) for key in common)
    differs = low > 0 or high < 0
    return {"difference": mean, "interval": [low, high], "differs": differs, "shares": shares, "n": len(common)}


def read_outcomes(run_dir: Path, task: str) -> dict[str, dict[int, Outcome]]:
    """The outcome of each row of an evaluation: {"greedy" | "t1" | "loss" | ...: {row number: outcome}}."""
    answers: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with (run_dir / SAMPLES).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("task") == task and row.get("value") is not None:
                answers.setdefault(row["decoding"], {}).setdefault(row["row"], []).append(row)
    return {kind: {row: _outcome(said) for row, said in rows.items()} for kind, rows in answers.items()}


def _outcome(answers: Sequence[Mapping[str, Any]]) -> Outcome:
    """The outcome of a row from its answers."""
    first = answers[0]
    return Outcome(fmean(float(one["value"]) for one in answers), float(first.get("weight", 1)), first.get("prompt"))


def outcome_pairs(before: Path, after: Path, task: str) -> dict[str, Sequence[Any] | dict[str, float | int]]:
    """The paired change of a task between two evaluation runs, by decoding method."""
    first, second = read_outcomes(before, task), read_outcomes(after, task)
    return {kind: paired(first[kind], second[kind]) for kind in first if kind in second}
