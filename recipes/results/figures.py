"""Figures of evaluations: their flat names, the results of a chain, paired comparisons."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.results.columns import TRUNCATED

Figures = dict[str, float | int | None]
Metrics = Mapping[str, Mapping[str, Any]]

# What stands behind a task's name for each value that eval.stage.evaluate returns.
_SUFFIX = {"greedy": "", "value": "", "greedy_truncated": TRUNCATED}


def figures(metrics: Metrics) -> Figures:
    """Flat figures of one evaluation: `exact_match`, `exact_match_t1`, `n`, ...

    `n` belongs to the first task, `TASK_n` to the others.
    """
    flat: Figures = {}
    for index, (task, values) in enumerate(metrics.items()):
        for name, value in values.items():
            if name != "n":
                suffix = "" if name == "loss" and task.endswith(name) else _SUFFIX.get(name, f"_{name}")
                flat[task + suffix] = value
        flat["n" if index == 0 else f"{task}_n"] = values["n"]
    return flat


def chain_results(
    seed: int, evaluations: Mapping[str, Metrics], comparisons: Mapping[str, Any], seconds: float, peak_gb: float
) -> dict[str, Any]:
    """results.json of a chain.

    Args:
        evaluations: metrics by their place, such as `stages.sft` or `reward_models.helpful`.
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


def paired(before: Mapping[Any, float], after: Mapping[Any, float]) -> dict[str, float | int]:
    """The mean change over the prompts that both evaluations have, with its standard error.

    Pairing takes the prompts' own difficulty out of the error: var(mean d) = var(d) / n, d = after - before.
    """
    changes = [after[key] - before[key] for key in before if key in after]
    n = len(changes)
    if n == 0:
        return {"difference": math.nan, "standard_error": math.nan, "n": 0}
    mean = sum(changes) / n
    variance = sum((change - mean) ** 2 for change in changes) / max(1, n - 1)
    return {"difference": round(mean, 5), "standard_error": round(math.sqrt(variance / n), 5), "n": n}


def read_outcomes(run_dir: Path, task: str) -> dict[str, dict[int, float]]:
    """The outcome of each prompt of an evaluation: {"greedy" | "t1": {number of the row: 1.0 or 0.0}}."""
    outcomes: dict[str, dict[int, float]] = {}
    with (run_dir / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("task") == task and row.get("value") is not None:
                outcomes.setdefault(row["decoding"], {})[row["row"]] = float(row["value"])
    return outcomes


def outcome_pairs(before: Path, after: Path, task: str) -> dict[str, Sequence[Any] | dict[str, float | int]]:
    """The paired change of a task between two evaluation runs, by way of decoding."""
    first, second = read_outcomes(before, task), read_outcomes(after, task)
    return {kind: paired(first[kind], second[kind]) for kind in first if kind in second}
