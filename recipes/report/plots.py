"""Which figures a run gets: a table by TRL's log names, and a default figure for every other key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup

from recipes.report.charts import Chart, Line
from recipes.report.metrics import Metrics, Point
from recipes.report.svg import Drawn, draw, heat_map
from recipes.results.words import short

MAX_LAYER_LINES = 6


@dataclass(frozen=True)
class Figure:
    """One figure: `keys` are (pattern of a log name, legend; {0} is the pattern's group, or the key)."""

    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]
    log_ok: bool = False
    note: str = ""


FIGURES = (
    Figure(
        "Loss",
        "loss",
        ((r"loss", "train"), (r"task_loss", "train, without balance"), (r"eval_loss", "held-out")),
    ),
    Figure("Reward", "reward", ((r"reward", "total, weighted"), (r"eval_reward", "total, held-out"))),
    Figure(
        "Right answers to held-out prompts",
        "share of prompts or answers",
        ((r"eval_avg@(\d+)", "mean of {0} answers"), (r"eval_pass@(\d+)", "at least one of {0}")),
        note="It should rise with the reward; where it falls, the policy learns the reward's faults.",
    ),
    Figure(
        "Reward components",
        "mean reward",
        ((r"rewards/(.+)/mean", "{0}"), (r"eval_rewards/(.+)/mean", "{0}, held-out")),
    ),
    Figure(
        "Spread of rewards",
        "standard deviation",
        ((r"reward_std", "total"), (r"rewards/(.+)/std", "{0}")),
        note="A group of completions with equal rewards teaches nothing.",
    ),
    Figure("Groups with equal rewards", "share of groups", ((r"frac_reward_zero_std", "no spread"),)),
    Figure(
        "Prompts replaced by others, and groups left out",
        "groups a rollout",
        ((r"dynamic_sampling/(replaced|still_equal)", "{0}"), (r"groups/left_out", "left out")),
    ),
    Figure(
        "Curriculum: pass rate of the prompts that were drawn",
        "share of answers",
        ((r"curriculum/pass_rate", "right"),),
    ),
    Figure(
        "Curriculum: prompts",
        "prompts",
        ((r"curriculum/seen", "sampled so far"), (r"curriculum/effective_prompts", "effective number drawn from")),
    ),
    Figure("KL to the reference", "nats per token", ((r"kl", "KL"),)),
    Figure(
        "Completion length",
        "tokens",
        (
            (r"completions/mean_length", "mean"),
            (r"completions/mean_terminated_length", "mean of the finished"),
            (r"completions/max_length", "longest"),
        ),
    ),
    Figure("Completions cut off", "share", ((r"completions/clipped_ratio", "cut off at the limit"),)),
    Figure(
        "Pairs ranked correctly",
        "share of pairs",
        (
            (r"accuracy|rewards/accuracies", "train"),
            (r"eval_accuracy|eval_rewards/accuracies", "held-out"),
            (r"pair_accuracy", "pairs"),
        ),
    ),
    Figure(
        "Margin of chosen over rejected",
        "score",
        ((r"margin|rewards/margins", "train"), (r"eval_margin|eval_rewards/margins", "held-out")),
    ),
    Figure(
        "Reward that the policy implies",
        "mean reward",
        (
            (r"rewards/(chosen|rejected)", "{0}"),
            (r"eval_rewards/(chosen|rejected)", "{0}, held-out"),
        ),
        note="Where both fall, the margin grows by making all of these answers less likely.",
    ),
    Figure(
        "Log-probability of answers",
        "nats",
        ((r"logps/(chosen|rejected)", "{0}"), (r"eval_logps/(chosen|rejected)", "{0}, held-out")),
    ),
    Figure(
        "Scores of the reward model",
        "score",
        ((r"mean_reward", "mean"), (r"min_reward", "lowest"), (r"max_reward", "highest")),
    ),
    Figure(
        "Token accuracy",
        "share of tokens",
        ((r"mean_token_accuracy", "train"), (r"eval_mean_token_accuracy", "held-out")),
    ),
    Figure(
        "Rollout against update",
        "share",
        ((r"mismatch/outside_x2", "tokens twice or half as likely"), (r"mismatch/routes_agree", "same experts")),
    ),
    Figure("KL of the rollout to the policy", "nats per token", ((r"mismatch/k3", "k3"),), log_ok=True),
    Figure(
        "Seconds of a step by phase",
        "seconds",
        ((r"step_time", "whole step"), (r"seconds/(.+)", "{0}")),
    ),
    Figure("Entropy", "nats per token", ((r"entropy", "train"), (r"eval_entropy", "held-out"))),
    Figure("Learning rate", "per step", ((r"learning_rate", "learning rate"),)),
    Figure("Gradient norm", "L2 norm before clipping", ((r"grad_norm", "gradient norm"),), log_ok=True),
    Figure(
        "Balance losses",
        "loss, coefficients included",
        ((r"balance/(.+)", "{0}"), (r"aux_loss", "auxiliary")),
        log_ok=True,
    ),
    Figure(
        "Busiest expert, all layers",
        "times an equal share",
        ((r"expert_load/max_over_mean", "max / mean"),),
        note="1 is perfect balance.",
    ),
    Figure("Dead experts", "experts without a token", ((r"expert_load/dead", "dead"),)),
)
LAYER_DEAD = re.compile(r"expert_load/layer_(\d+)/dead")
LAYER_LOAD = re.compile(r"expert_load/layer_(\d+)/max_over_mean")
# Constant during the run, or shown elsewhere: not useful as a curve.
NOT_DRAWN = re.compile(r"total_flos|train_(runtime|loss|samples_per_second|steps_per_second)")


def figures(metrics: Metrics) -> tuple[list[Drawn], list[Drawn]]:
    """The figures of FIGURES that have data, and a default figure for every other logged key."""
    used: set[str] = set()
    main = [chart for figure in FIGURES if (chart := _chart(figure, metrics, used))]
    main += _layer_lines(metrics)
    for pattern in (LAYER_LOAD, LAYER_DEAD, NOT_DRAWN):
        used.update(filter(pattern.fullmatch, metrics.series))
    other = [
        Chart(key, "as logged", (_line(key, key, metrics),))
        for key, points in sorted(metrics.series.items())
        if points and key not in used
    ]
    return [draw(chart) for chart in main], [draw(chart) for chart in other]


def expert_maps(metrics: Metrics) -> list[tuple[str, Markup]]:
    """Titled heat maps: each expert's load when first and last logged, and each layer's busiest over time."""
    maps = []
    for index in (0, -1):
        logged = {layer: values[index] for layer, values in metrics.shares.items()}
        rows = [(str(layer), _relative(shares)) for layer, (_, shares) in logged.items() if shares]
        title = f"Load of each expert, step {max((step for step, _ in logged.values()), default=0):g}"
        if rows and title not in [known for known, _ in maps]:
            experts = [str(expert) for expert in range(max(len(values) for _, values in rows))]
            maps.append((title, heat_map(rows, experts, "expert", f"{title}. {_busiest(rows)}")))
    layers = _layer_loads(metrics)
    if len(layers) > MAX_LAYER_LINES:
        title = "Busiest expert of each layer over time"
        rows, steps = _binned(layers)
        maps.append((title, heat_map(rows, steps, "optimizer step", f"{title}. {_busiest(rows)}")))
    return maps


def _chart(figure: Figure, metrics: Metrics, used: set[str]) -> Chart | None:
    lines = []
    for pattern, legend in figure.keys:
        for key in sorted(metrics.series):
            match = re.fullmatch(pattern, key)
            if match and metrics.series[key]:
                used.add(key)
                lines.append(_line(legend.format(*match.groups()), key, metrics))
    note = _dead_layers(metrics) if figure.title == "Dead experts" else figure.note
    return Chart(figure.title, figure.unit, lines, figure.log_ok, note) if lines else None


def _dead_layers(metrics: Metrics) -> str:
    """Which layers have dead experts at the last logged step."""
    last = {int(m[1]): p[-1][1] for key, p in metrics.series.items() if p and (m := LAYER_DEAD.fullmatch(key))}
    dead = [f"{experts:g} in layer {layer}" for layer, experts in sorted(last.items()) if experts]
    return f"At the last step: {', '.join(dead) or 'none'}." if last else ""


def _line(label: str, key: str, metrics: Metrics) -> Line:
    # The schedule and held-out values are exact: a moving average would distort them.
    noisy = not key.startswith("eval_") and key != "learning_rate"
    return Line(label, metrics.series[key], noisy)


def _layer_loads(metrics: Metrics) -> dict[int, list[Point]]:
    loads = {int(m[1]): points for key, points in metrics.series.items() if (m := LAYER_LOAD.fullmatch(key))}
    return {layer: points for layer, points in sorted(loads.items()) if points}


def _layer_lines(metrics: Metrics) -> list[Chart]:
    """A few layers are drawn as lines; many are a heat map (expert_maps)."""
    layers = _layer_loads(metrics)
    if not 0 < len(layers) <= MAX_LAYER_LINES:
        return []
    lines = [Line(f"layer {layer}", points) for layer, points in layers.items()]
    return [Chart("Busiest expert by layer", "times an equal share", lines, note="1 is perfect balance.")]


def _binned(layers: dict[int, list[Point]], most: int = 40) -> tuple[list[tuple[str, list[float]]], list[str]]:
    """Layers x spans of steps, the mean of each span, and the first step of each span."""
    n = max(len(points) for points in layers.values())
    spans = [range(k * n // min(n, most), (k + 1) * n // min(n, most)) for k in range(min(n, most))]
    rows = []
    for layer, points in layers.items():
        values_of_spans = [[points[i][1] for i in span if i < len(points)] for span in spans]
        rows.append((str(layer), [sum(part) / len(part) for part in values_of_spans if part]))
    longest = max(layers.values(), key=len)
    return rows, [short(longest[span.start][0]) for span in spans]


def _relative(shares: list[float]) -> list[float]:
    """Shares (or counts) as multiples of an equal share."""
    total = sum(shares)
    return [share * len(shares) / total if total else 0.0 for share in shares]


def _busiest(rows: list[tuple[str, list[float]]]) -> str:
    load, layer = max((max(values), name) for name, values in rows)
    dead = sum(value == 0 for _, values in rows for value in values)
    return f"Highest: {short(load)} times an equal share in layer {layer}; cells without a token: {dead}."
