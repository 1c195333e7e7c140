"""Heat maps of the load of experts: of each expert at one step, and over the steps."""

from __future__ import annotations

import re

from markupsafe import Markup

from recipes.report.charts import STEP
from recipes.report.metrics import Metrics, Point
from recipes.report.svg import heat_map
from recipes.results.words import short

LAYER_LOAD = re.compile(r"expert_load/layer_(\d+)/max_over_mean")


def expert_maps(metrics: Metrics) -> list[tuple[str, Markup]]:
    """Titled heat maps: each expert's load when first and last logged, and over the steps each layer's busiest or, of a
    single layer, each expert's."""
    title, series = _over_time(metrics)
    single = len(metrics.shares) == 1
    over_time = []
    if max(map(len, series.values()), default=0) > 1:
        rows, steps = _binned(series)
        corner = "expert" if single else "layer"
        over_time = [(title, heat_map(rows, steps, STEP, f"{title}. {_busiest(rows, corner)}", corner=corner))]
    return over_time if single and over_time else [*_at_the_ends(metrics), *over_time]


def _at_the_ends(metrics: Metrics) -> list[tuple[str, Markup]]:
    """Layers x experts, when first and last logged."""
    maps: dict[str, Markup] = {}
    for index in (0, -1):
        logged = {layer: values[index] for layer, values in metrics.shares.items()}
        rows = [(str(layer), _relative(shares)) for layer, (_, shares) in logged.items() if shares]
        title = f"Load of each expert, step {max((step for step, _ in logged.values()), default=0):g}"
        if rows:
            experts = [str(expert) for expert in range(max(len(values) for _, values in rows))]
            maps.setdefault(title, heat_map(rows, experts, "expert", f"{title}. {_busiest(rows)}"))
    return [*maps.items()]


def _over_time(metrics: Metrics) -> tuple[str, dict[int, list[Point]]]:
    """What a map over the steps shows: a title, and the load of each layer's busiest expert or, of a single layer, of
    each expert."""
    if len(metrics.shares) != 1:
        return "Busiest expert of each layer over the steps", layer_loads(metrics)
    ((layer, logged),) = metrics.shares.items()
    loads = [(step, _relative(shares)) for step, shares in logged]
    experts = range(min(len(load) for _, load in loads))
    return f"Load of each expert of layer {layer} over the steps", {
        expert: [(step, load[expert]) for step, load in loads] for expert in experts
    }


def layer_loads(metrics: Metrics) -> dict[int, list[Point]]:
    """The load of the busiest expert of each layer, relative to an equal share, by step."""
    loads = {int(m[1]): points for key, points in metrics.series.items() if (m := LAYER_LOAD.fullmatch(key))}
    return {layer: points for layer, points in sorted(loads.items()) if points}


def _binned(series: dict[int, list[Point]], most: int = 40) -> tuple[list[tuple[str, list[float]]], list[str]]:
    """Layers or experts x spans of steps, the mean of each span, and the first step of each span."""
    n = max(len(points) for points in series.values())
    spans = [range(k * n // min(n, most), (k + 1) * n // min(n, most)) for k in range(min(n, most))]
    rows = []
    for name, points in series.items():
        values_of_spans = [[points[i][1] for i in span if i < len(points)] for span in spans]
        rows.append((str(name), [sum(part) / len(part) for part in values_of_spans if part]))
    longest = max(series.values(), key=len)
    return rows, [short(longest[span.start][0]) for span in spans]


def _relative(shares: list[float]) -> list[float]:
    """Shares (or counts) as multiples of an equal share."""
    total = sum(shares)
    return [share * len(shares) / total if total else 0.0 for share in shares]


def _busiest(rows: list[tuple[str, list[float]]], named: str = "layer") -> str:
    load, layer = max((max(values), name) for name, values in rows)
    dead = sum(value == 0 for _, values in rows for value in values)
    return f"Highest: {short(load)} times an equal share in {named} {layer}; cells without a token: {dead}."
