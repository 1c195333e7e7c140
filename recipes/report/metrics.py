"""Sorts the logged values of a run (the lines of metrics.jsonl) into series that can be drawn, and the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from recipes.results.words import count, number

Point = tuple[float, float]


@dataclass
class Metrics:
    """`series`: key -> (step, value) points, ascending; `shares`: MoE layer -> (step, share of each expert);
    `loose`: values that cannot be plotted (lines without a step, text), the last of each key."""

    series: dict[str, list[Point]] = field(default_factory=dict)
    shares: dict[int, list[tuple[float, list[float]]]] = field(default_factory=dict)
    loose: dict[str, Any] = field(default_factory=dict)


def collect(rows: Iterable[dict[str, Any]], notes: list[str]) -> Metrics:
    """Sort the lines of metrics.jsonl into plots and the rest.

    After a resume some steps are logged again: the later line is used, and a note says so.
    """
    metrics = Metrics()
    values: dict[str, dict[float, float]] = {}
    shares: dict[int, dict[float, list[float]]] = {}
    repeated: set[float] = set()
    stepless = bad_shares = 0
    for row in rows:
        step = number(row.pop("step", None))
        row.pop("epoch", None)
        if step is None or not abs(step) < HUGE:
            stepless += 1
            metrics.loose.update(row)
            continue
        for key, value in row.items():
            if type(value) is float and key in values:  # nearly all of a long run
                series = values[key]
                if step in series:
                    repeated.add(step)
                series[step] = value
                continue
            # null is written for NaN and infinity, which JSON does not have.
            as_number = math.nan if value is None else number(value)
            if isinstance(value, list) and (layer := _share_layer(key)) is not None:
                of_experts = [share for item in value if (share := number(item)) is not None and math.isfinite(share)]
                bad_shares += len(of_experts) < len(value)
                shares.setdefault(layer, {}).update({step: of_experts} if len(of_experts) == len(value) else {})
            elif as_number is None:
                metrics.loose[key] = value
            else:
                series = values.setdefault(key, {})
                repeated.update({step} if step in series else ())
                series[step] = as_number
    if stepless:
        notes.append(f"{count(stepless, 'line')} without a step in metrics.jsonl: listed, not plotted")
    if bad_shares:
        notes.append(f"{count(bad_shares, 'list')} of expert shares left out: not all items are numbers")
    if repeated:
        notes.append(f"{count(len(repeated), 'step')} logged more than once, after a resume: the last line counts")
    metrics.series = {key: _finite(key, series, notes) for key, series in values.items()}
    metrics.shares = {layer: sorted(series.items()) for layer, series in sorted(shares.items()) if series}
    return metrics


def _share_layer(key: str) -> int | None:
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "expert_load" or parts[2] != "share":
        return None
    digits = parts[1].removeprefix("layer_")
    return int(digits) if digits.isascii() and digits.isdigit() else None


# Beyond this a chart's arithmetic would overflow: as good as infinite.
HUGE = 1e300


def _finite(key: str, values_by_step: dict[float, float], notes: list[str]) -> list[Point]:
    points = sorted(values_by_step.items())
    drawn = [point for point in points if abs(point[1]) < HUGE]
    if len(drawn) < len(points):
        bad = [step for step, value in points if not abs(value) < HUGE]
        values = count(len(bad), "NaN or infinite value")
        notes.append(f"{key}: {values} not drawn, the first at step {bad[0]:g}")
    return drawn
