"""Which figures a run gets: a table by TRL's log names, and a default figure for every other key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from recipes.report.charts import Chart, Line
from recipes.report.expert_maps import LAYER_LOAD, layer_loads
from recipes.report.metrics import Metrics
from recipes.report.relations import held_out_chart
from recipes.report.svg import Drawn, draw

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
EXACT = ("learning_rate", "num_tokens", "curriculum/seen")
# Constant during the run, or shown elsewhere: not useful as a curve.
NOT_DRAWN = re.compile(r"total_flos|train_(runtime|loss|samples_per_second|steps_per_second)")


def figures(metrics: Metrics) -> tuple[list[Drawn], list[Drawn]]:
    """The figures of FIGURES that have data, and a default figure for every other logged key."""
    used: set[str] = set()
    main = [chart for figure in FIGURES if (chart := _chart(figure, metrics, used))]
    main += [chart for chart in (held_out_chart(metrics),) if chart] + _layer_lines(metrics)
    for pattern in (LAYER_LOAD, LAYER_DEAD, NOT_DRAWN):
        used.update(filter(pattern.fullmatch, metrics.series))
    other = [
        Chart(key, "as logged", (_line(key, key, metrics),))
        for key, points in sorted(metrics.series.items())
        if points and key not in used
    ]
    return [draw(chart) for chart in main], [draw(chart) for chart in other]


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
    # The schedule, counters and held-out values are exact: a moving average would distort them.
    noisy = not key.startswith("eval_") and key not in EXACT
    return Line(label, metrics.series[key], noisy)


def _layer_lines(metrics: Metrics) -> list[Chart]:
    """A few layers are drawn as lines too; many are a heat map alone (expert_maps)."""
    layers = layer_loads(metrics)
    if not 0 < len(layers) <= MAX_LAYER_LINES:
        return []
    lines = [Line(f"layer {layer}", points) for layer, points in layers.items()]
    return [Chart("Busiest expert by layer", "times an equal share", lines, note="1 is perfect balance.")]
