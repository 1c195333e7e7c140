"""Figures of evaluations: flat names, the results of a chain, and the table that the user sees."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, float | int | None]
Metrics = Mapping[str, Mapping[str, Any]]

# What stands behind a task's name for each value that eval.stage.evaluate returns.
_SUFFIX = {"greedy": "", "value": "", "greedy_truncated": "_truncated"}
TRUNCATED = "_truncated"  # the end of a figure's name: the share of answers that max_new_tokens cut


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
    """What an evaluation found prompt by prompt: {"greedy" | "t1": {number of the row: 1.0 or 0.0}}."""
    found: dict[str, dict[int, float]] = {}
    with (run_dir / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("task") == task and row.get("value") is not None:
                found.setdefault(row["decoding"], {})[row["row"]] = float(row["value"])
    return found


def table_text(results: Mapping[str, Any]) -> str:
    """The stages' figures, the reward models' and the comparisons as text that is never wrapped."""
    parts = [
        _table(title, results[section])
        for section, title in (("stages", "Stages"), ("reward_models", "Reward models, held-out pairs ranked right"))
        if results.get(section)
    ]
    lines = [_comparison_line(name, value) for name, value in results.items() if _is_comparison(value)]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def _table(title: str, rows: Mapping[str, Figures]) -> str:
    """Names on the left, figures on the right of their columns, and the numbers of prompts below."""
    keys = list(dict.fromkeys(name for row in rows.values() for name in row))
    shown = [key for key in keys if not _is_count(key) and not key.endswith(TRUNCATED)]
    cells = [["", *map(_heading, shown)]]
    cells += [[name.replace("_", " "), *(_cell(key, row.get(key)) for key in shown)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([title, lines[0], rule, *lines[1:], _counts(keys, rows), *_cut(keys, rows)])


def _cut(keys: Sequence[str], rows: Mapping[str, Figures]) -> list[str]:
    """What share of answers was cut, of the tasks where some were: the most of any row."""
    most = {key: max(row.get(key) or 0 for row in rows.values()) for key in keys if key.endswith(TRUNCATED)}
    told = [f"{_heading(key.removesuffix(TRUNCATED))} {100 * share:.1f} %" for key, share in most.items() if share]
    return [f"cut at max_new_tokens, at most: {'; '.join(told)}"] if told else []


def _counts(keys: Sequence[str], rows: Mapping[str, Figures]) -> str:
    """How many prompts (or pairs) stand behind each task: `n: exact match 1,000; refusal safe 500`."""
    first = next(key for key in keys if not _is_count(key) and not key.endswith(TRUNCATED))
    parts = []
    for key in filter(_is_count, keys):
        task = first if key == "n" else key.removesuffix("_n")
        counts = sorted({row[key] or 0 for row in rows.values() if key in row})
        parts.append(f"{_heading(task)} {' or '.join(f'{count:,}' for count in counts)}")
    return f"n: {'; '.join(parts)}"


def _is_count(key: str) -> bool:
    return key == "n" or key.endswith("_n")


def _is_comparison(value: Any) -> bool:
    return isinstance(value, dict) and "before" in value and "after" in value


def _comparison_line(name: str, value: Mapping[str, Any]) -> str:
    changes = [
        f"{_decoding(kind)} {100 * change['difference']:+.1f} points (standard error "
        f"{100 * change['standard_error']:.1f}, {change['n']:,} prompts)"
        for kind, change in value["change"].items()
        if change["n"]
    ]
    pair = f"{value['task']}, {value['before']} -> {value['after']}"
    return f"{name.replace('_', ' ')} ({pair}, paired): {'; '.join(changes) or 'no prompts in common'}"


def _decoding(kind: str) -> str:
    return {"greedy": "greedy", "t1": "T = 1"}.get(kind, kind)


def _heading(column: str) -> str:
    name = f"{column[:-3]}, T = 1" if column.endswith("_t1") else column
    return name.replace("_", " ")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f} nats" if column.endswith("loss") else f"{100 * value:.1f} %"


def outcome_pairs(before: Path, after: Path, task: str) -> dict[str, Sequence[Any] | dict[str, float | int]]:
    """The paired change of a task between two evaluation runs, by way of decoding."""
    first, second = read_outcomes(before, task), read_outcomes(after, task)
    return {kind: paired(first[kind], second[kind]) for kind in first if kind in second}
