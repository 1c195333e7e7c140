"""Charts whose x axis is not the step: how a reward model's scores relate to right answers and to length, and the
held-out figures of RL to its reward."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from conversations.answers.intervals import mean_interval
from recipes.report.charts import Chart, Line
from recipes.report.metrics import HUGE, Metrics, Point
from recipes.results.words import count, number

BINS = 10  # of confidence, from one half to one, as of the figure calibration_error (eval/agreement.py)
HELD_OUT = re.compile(r"eval_avg@(\d+)")


@dataclass(frozen=True)
class Scored:
    """A judged row: its scores, and lengths in tokens (none of pairs that were only ranked). The first `right` are of
    right answers; the others are of wrong ones, or unjudged if `judged` is false."""

    task: str
    prompt: str
    scores: Sequence[float]
    lengths: Sequence[float]
    right: int
    judged: bool

    def margins(self) -> list[float]:
        """Of each right answer over each wrong one; a single answer's, over the score 0."""
        good, bad = self.scores[: self.right], self.scores[self.right :]
        if not self.judged:
            return []
        if len(self.scores) == 1:
            return [*good, *(-score for score in bad)]
        return [better - worse for better in good for worse in bad]


def score_charts(samples: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """The calibration of a reward model that an evaluation scored answers with, and its scores against length."""
    rows = [row for sample in samples if (row := _scored(sample))]
    return [chart for chart in (_calibration(rows), _against_length(rows)) if chart]


def held_out_chart(metrics: Metrics) -> Chart | None:
    """Right answers to held-out prompts against the reward in training, as training goes on."""
    if not (reward := metrics.series.get("reward")):
        return None
    curve = Line("reward", reward).curve
    steps = [step for step, _ in curve]
    lines = []
    for key, points in sorted(metrics.series.items()):
        if match := HELD_OUT.fullmatch(key):
            path = [(curve[at - 1][1], value) for step, value in points if (at := bisect_right(steps, step))]
            lines += [Line(f"mean of {match[1]} answers", path, noisy=False)] if len(path) > 1 else []
    note = "Joined in the order of training. Where it turns down while the reward goes on, the reward is gamed."
    title = "Held-out answers against the reward"
    return Chart(title, "share right", lines, note=note, over="reward in training") if lines else None


def _scored(sample: Mapping[str, Any]) -> Scored | None:
    """A line of samples.jsonl that holds scores; None for another, or for one that is not as evaluations write it."""
    scores, lengths = _numbers(sample.get("scores")), _numbers(sample.get("lengths"))
    if not scores or len(lengths) not in (0, len(scores)):
        return None
    label, right = sample.get("label"), sample.get("right", 1 if "rejected" in sample else None)
    judged = isinstance(label, bool) or type(right) is int
    first = int(label) if isinstance(label, bool) else right if type(right) is int else 0
    return Scored(str(sample.get("task", "")), str(sample.get("prompt", "")), scores, lengths, max(first, 0), judged)


def _numbers(value: Any) -> list[float]:
    found = [number(item) for item in value] if isinstance(value, list) else []
    kept = [item for item in found if item is not None and abs(item) < HUGE]
    return kept if len(kept) == len(found) else []


def _calibration(rows: Sequence[Scored]) -> Chart | None:
    by_task: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).extend((row.prompt, margin) for margin in row.margins())
    lines = [_calibration_line(task, margins) for task, margins in by_task.items() if margins]
    if not lines:
        return None
    ideal = Line("as confident as right", ((0.5, 0.5), (1.0, 1.0)), noisy=False, guide=True)
    note = (
        "Comparisons in ten bins of confidence, the sigmoid of the difference of the scores; bars: 95 % intervals. "
        "Below the diagonal the model is too sure."
    )
    return Chart("Calibration", "share ranked correctly", [*lines, ideal], note=note, over="confidence")


def _calibration_line(task: str, margins: Sequence[tuple[str, float]]) -> Line:
    """The share of right comparisons of each bin, at the bin's mean confidence."""
    bins: dict[int, list[tuple[str, float, float]]] = {}
    for prompt, margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        place = min(int(2 * BINS * (confidence - 0.5)), BINS - 1)
        bins.setdefault(place, []).append((prompt, confidence, 0.5 if margin == 0 else float(margin > 0)))
    points: list[Point] = []
    bars: list[Point] = []
    for _, compared in sorted(bins.items()):
        prompts, confidences, right = zip(*compared, strict=True)
        points.append((fmean(confidences), fmean(right)))
        bars.append(mean_interval(right, prompts))
    return Line(f"{task} ({count(len(margins), 'comparison')})", points, noisy=False, bars=bars)


def _against_length(rows: Sequence[Scored]) -> Chart | None:
    groups: dict[str, list[Point]] = {"right answers": [], "wrong answers": [], "answers": []}
    for row in rows:
        for place, point in enumerate(zip(row.lengths, row.scores, strict=False)):
            group = "answers" if not row.judged else "right answers" if place < row.right else "wrong answers"
            groups[group].append(point)
    lines = [Line(label, points, scattered=True) for label, points in groups.items() if points]
    note = "A cloud that rises with length shows a model that likes long answers, whatever they say."
    return Chart("Score against length", "score", lines, note=note, over="tokens") if lines else None
