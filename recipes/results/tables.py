"""The tables of results.json and of evaluations, with one layout (layout.py) for the page and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from conversations.answers.intervals import Z95
from recipes.results.columns import LOSS, SHARE, VERSION, Figures, columns_of, failures, heading_of, is_cut
from recipes.results.layout import Cell, Table, as_text, plain_cell
from recipes.results.titles import UNTITLED, Titles
from recipes.results.words import NOT_STATED, flatten, number, short

OF_RESULTS = (VERSION, "seed", "stages", "reward_models", "seconds", "peak_memory_gb", "targets")


def table_text(results: Mapping[str, Any], titles: Titles = UNTITLED) -> str:
    """The tables of results.json for a terminal, never wrapped."""
    return "\n\n".join(as_text(table) for table in headline(results, titles))


def headline(results: Mapping[str, Any], titles: Titles = UNTITLED) -> list[Table]:
    """The non-empty tables of a chain's results.json, or of {"stages": {name: figures}}."""
    tables = [
        figures_table("Stages", entries(results, "stages"), titles.section("stages"), titles.tasks),
        changes(results, titles),
        figures_table(
            "Reward models", entries(results, "reward_models"), titles.section("reward_models"), titles.tasks
        ),
        targets(results),
    ]
    details = [
        table
        for section in ("stages", "reward_models")
        for name, entry in entries(results, section).items()
        for table in detail_tables(titles.section(section).get(name, name), entry, titles.tasks)
    ]
    return [*(table for table in tables if table), *details]


def figures_table(
    title: str, evaluations: Mapping[str, Figures], names: Mapping[str, str], tasks: Mapping[str, str]
) -> Table | None:
    """Rows are entries (those in `names` first, in that order); columns are shares, then other metrics."""
    columns = columns_of(list(evaluations.values()), tasks)
    if not columns:
        return None
    rows = [
        [Cell(names.get(name, name)), *(column.cell(evaluations[name]) for column in columns)]
        for name in _in_order(evaluations, names)
    ]
    cut = [number(entry[key]) for entry in evaluations.values() for key in entry if is_cut(key)]
    kinds = {column.kind for column in columns}
    notes = ["Below a share: its 95% interval, in per cent."] if SHARE in kinds else []
    notes += ["Below a loss: its 95% interval, in nats."] if LOSS in kinds else []
    notes += ["Cut: the share of answers cut off at max_new_tokens, if any."] if any(cut) else []
    notes += ["No answer was cut off at max_new_tokens."] if cut and not any(cut) else []
    notes += [
        f"{names.get(name, name)}: {task} failed: {why}"
        for name, entry in evaluations.items()
        for task, why in failures(entry).items()
    ]
    return Table(title, [Cell(""), *(column.heading for column in columns)], rows, notes)


def detail_tables(title: str, evaluation: Figures, tasks: Mapping[str, str]) -> list[Table]:
    """The figures of one evaluation that are listed by name: {name: {value, interval, n}}."""
    listed = {key: value for key, value in evaluation.items() if _is_listed(value)}
    headings = (Cell(""), Cell("Value"), Cell("95% interval"), Cell("Rows"))
    return [
        Table(f"{title}: {heading_of(key, tasks)}", headings, [_detail_row(key, *item) for item in value.items()])
        for key, value in listed.items()
    ]


def _is_listed(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(figure, dict) and "value" in figure for figure in value.values())
    )


def _detail_row(key: str, name: str, figure: Mapping[str, Any]) -> list[Cell]:
    bounds = [number(bound) for bound in figure.get("interval") or ()]
    interval = Cell(" to ".join(short(bound) for bound in bounds if bound is not None) or "–")
    title = heading_of(name, {"auc": "AUC"}) if key.endswith("details") else name
    return [Cell(title), plain_cell(figure["value"]), interval, plain_cell(figure.get("n"))]


def entries(results: Mapping[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The well-formed entries of `stages` or `reward_models`."""
    listed = results.get(section)
    return {str(k): v for k, v in listed.items() if isinstance(v, dict)} if isinstance(listed, dict) else {}


def _in_order(names: Iterable[str], preferred: Iterable[str]) -> list[str]:
    """The names, those in `preferred` first and in that order."""
    present = dict.fromkeys(names)
    return list(dict.fromkeys([*(name for name in preferred if name in present), *present]))


def changes(results: Mapping[str, Any], titles: Titles = UNTITLED) -> Table | None:
    """The paired comparisons of results.json: shares in percentage points, losses in nats."""
    comparisons = {name: value for name, value in results.items() if is_comparison(value)}
    if not comparisons:
        return None
    kinds = list(dict.fromkeys(str(kind) for value in comparisons.values() for kind in value["change"]))
    rows = [
        [_compared(name, value, titles), *(_paired_cell(kind, value["change"].get(kind)) for kind in kinds)]
        for name, value in comparisons.items()
    ]
    units = {"nats": LOSS in kinds, "percentage points": set(kinds) != {LOSS}}
    unit = " or ".join(unit for unit, used in units.items() if used)
    note = f"After minus before on the same prompts, in {unit}; below: the 95% interval of the mean difference."
    note += " *: it leaves zero." if any(_states_interval(value) for value in comparisons.values()) else ""
    headings = [Cell(re.sub(r"^t(?=[0-9.]+$)", "T = ", kind)) for kind in kinds]
    return Table("Changes, paired", [Cell(""), *headings], rows, (note,))


def _states_interval(comparison: Mapping[str, Any]) -> bool:
    return any("interval" in change for change in comparison["change"].values() if isinstance(change, dict))


def is_comparison(value: Any) -> bool:
    """Whether an entry of results.json is a paired comparison of two evaluations."""
    return isinstance(value, dict) and {"before", "after"} <= set(value) and isinstance(value.get("change"), dict)


def _compared(name: str, value: Mapping[str, Any], titles: Titles) -> Cell:
    before, after = (titles.stages.get(str(value[side]), value[side]) for side in ("before", "after"))
    task = (heading_of(str(value["task"]), titles.tasks),) if "task" in value else ()
    return Cell(titles.comparisons.get(name, name), (*task, f"{before} → {after}"))


def _paired_cell(kind: str, change: Any) -> Cell:
    """A change in percentage points for a share, in nats for a loss, otherwise in its own unit; one whose own interval
    leaves zero is marked."""
    stated = change if isinstance(change, dict) else {}
    mean, n = number(stated.get("difference")), number(stated.get("n"))
    interval = _interval_of_change(stated, mean)
    if mean is None or interval is None or n is None or not all(map(math.isfinite, (mean, *interval))):
        return Cell("–", ("no prompts in common",) if stated else ())
    signed = _signed_nats if kind == LOSS or stated.get("shares") is False else _signed_points
    mark = " *" if stated.get("differs") else ""
    return Cell(signed(mean) + mark, (f"{signed(interval[0])} to {signed(interval[1])}", f"n = {n:,.0f}"))


def _interval_of_change(stated: Mapping[str, Any], mean: float | None) -> tuple[float, float] | None:
    """The 95% interval that a change states, or else that of its standard error."""
    bounds = [number(bound) for bound in stated.get("interval") or ()]
    match bounds:
        case [float(low), float(high)]:
            return low, high
    error = number(stated.get("standard_error"))
    return None if mean is None or error is None else (mean - Z95 * error, mean + Z95 * error)


def targets(results: Mapping[str, Any]) -> Table | None:
    """The `targets` of results.json: a list, or a mapping by name, of {target, value, met}; a bare bool is `met`."""
    stated = results.get("targets")
    if isinstance(stated, dict):
        stated = [{"name": k, **(v if isinstance(v, dict) else {"met": v})} for k, v in stated.items()]
    if not isinstance(stated, list):
        return None
    rows = []
    for item in stated:
        target = item if isinstance(item, dict) else {"name": str(item)}
        met = target.get("met")
        verdict = Cell("met", tone="good") if met is True else Cell("not met", tone="bad")
        verdict = verdict if isinstance(met, bool) else Cell(NOT_STATED)
        cells = [plain_cell(target.get("target")), plain_cell(target.get("value")), verdict]
        rows.append([Cell(str(target.get("name", "–"))), *cells])
    return Table("Targets", [Cell(""), Cell("Target"), Cell("Reached"), Cell("")], rows) if rows else None


def other_results(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything in results.json that no table above shows."""
    return flatten({key: value for key, value in results.items() if key not in OF_RESULTS and not is_comparison(value)})


def across(chains: Sequence[Mapping[str, Any]], names: Mapping[str, str], tasks: Mapping[str, str]) -> Table | None:
    """Mean and range of every share across the results of several chains (seeds)."""
    if len(chains) < 2:
        return None
    by_stage = [entries(results, "stages") for results in chains]
    row_names = _in_order(dict.fromkeys(name for stages in by_stage for name in stages), names)
    all_entries = [entry for stages in by_stage for entry in stages.values()]
    shares = [column for column in columns_of(all_entries, tasks) if column.kind == SHARE]
    rows = [
        [
            Cell(names.get(name, name)),
            *(_spread([stages.get(name, {}).get(column.key) for stages in by_stage]) for column in shares),
        ]
        for name in row_names
    ]
    seeds = ", ".join(str(results.get("seed", NOT_STATED)) for results in chains)
    headings = [Cell(""), *(column.heading for column in shares)]
    return Table("All chains", headings, rows, (f"Mean and range; seeds: {seeds}.",))


def _signed_points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")


def _signed_nats(loss: float) -> str:
    return f"{loss:+.3f}".replace("-", "\u2212")


def _spread(values: Sequence[Any]) -> Cell:
    shares = [v for value in values if (v := number(value)) is not None and math.isfinite(v)]
    if not shares:
        return Cell("–")
    spread = f"{100 * min(shares):.1f} to {100 * max(shares):.1f}"
    return Cell(f"{100 * fmean(shares):.1f} %", (spread, f"{len(shares)} chains"))
