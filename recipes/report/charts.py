"""Charts as data (drawn by svg.py), with smoothing, thinning and a text description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, count, repeat
from operator import itemgetter

from recipes.report.metrics import Point
from recipes.results.words import short

SMOOTH_FROM = 30  # logged values; shorter curves are drawn as they are
MAX_DRAWN = 240  # points of one line; more are thinned, extremes kept
STEP = "optimizer step"  # what the x axis is unless a chart says otherwise


@dataclass(frozen=True)
class Line:
    """One line of a chart, of at least one point. `noisy`: faint dots for the values, a curve for their moving average.
    `scattered`: dots alone. `bars`: an interval of y around each point, if they have one. `guide`: a thin line without
    dots, which the others are read against."""

    label: str
    points: Sequence[Point]
    noisy: bool = True
    scattered: bool = False
    bars: Sequence[Point] = ()
    guide: bool = False

    @cached_property
    def is_smoothed(self) -> bool:
        return self.noisy and not self.scattered and len(self.points) >= SMOOTH_FROM

    @cached_property
    def curve(self) -> Sequence[Point]:
        """The moving average, or the values themselves if they are few or exact."""
        return moving_average(self.points, window_of(len(self.points))) if self.is_smoothed else self.points


@dataclass(frozen=True)
class Chart:
    """A figure: `unit` labels the y axis, `over` the x axis; `log_ok`: use a log scale if the highest value is over 30
    times the lowest."""

    title: str
    unit: str
    lines: Sequence[Line]
    log_ok: bool = False
    note: str = ""
    over: str = STEP

    @property
    def in_words(self) -> str:
        """A text alternative for the chart."""
        curves = "; ".join(map(self._curve_in_words, self.lines))
        return f"{self.title} ({self.unit}): {curves}"

    def _curve_in_words(self, line: Line) -> str:
        (first, start), (last, end) = line.points[0], line.curve[-1]
        if line.scattered:
            return f"{line.label}, {len(line.points):,} points over {self.over}"
        span = f"steps {first:g} to {last:g}" if self.over == STEP else f"{self.over} {short(first)} to {short(last)}"
        return f"{line.label} from {short(start)} to {short(end)} over {span}"

    @property
    def caption(self) -> str:
        """The note below the drawing, with how curves are smoothed and which dots are left out."""
        smoothed = max((len(line.points) for line in self.lines if line.is_smoothed), default=0)
        sentences = [self.note] if self.note else []
        scattered = max((len(line.points) for line in self.lines if line.scattered), default=0)
        if scattered > MAX_DRAWN:
            sentences.append(f"One dot for every {every(scattered)} of at most {scattered:,} values of a colour.")
        if smoothed > MAX_DRAWN:
            sentences.append(f"Dots: the lowest and highest of every {2 * smoothed // MAX_DRAWN} values.")
        elif smoothed:
            sentences.append("Dots: logged values.")
        if smoothed:
            sentences.append(f"Line: mean over {window_of(smoothed)} values.")
        return " ".join(sentences)


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` values. At the start, where curves are steep, the window shrinks on both sides; at the
    end it only shrinks on the right."""
    half, n = window // 2, len(points)
    sums = list(accumulate((value for _, value in points), initial=0.0))
    starts = chain(repeat(0, half), count())
    ends = chain(range(1, min(2 * half, n), 2), range(2 * half + 1, n + 1), repeat(n))
    return [
        (step, (sums[end] - sums[start]) / (end - start))
        for (step, _), start, end in zip(points, starts, ends, strict=False)
    ]


def window_of(n: int) -> int:
    """Values in the moving average of a curve of `n`: about a twentieth, odd."""
    return max(5, n // 20) | 1


def every(n: int) -> int:
    """Of `n` scattered points, every which one is drawn."""
    return -(-n // MAX_DRAWN)


def thin(points: Sequence[Point], most: int = MAX_DRAWN) -> Sequence[Point]:
    """At most `most` points: the lowest and highest of each bin, so that no spike is lost."""
    if len(points) <= most:
        return points
    bins = most // 2
    points_kept: list[Point] = []
    for index in range(bins):
        part = points[index * len(points) // bins : (index + 1) * len(points) // bins]
        points_kept += sorted({min(part, key=itemgetter(1)), max(part, key=itemgetter(1))})
    return points_kept
