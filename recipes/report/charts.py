"""Small charts as inline SVG: no scripts, no fonts; colours are CSS classes, for light and dark alike.

Lengths are in units of the view box, which a screen of 400 px or more shows at about one pixel each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from recipes.report.metrics import Point

WIDTH, HEIGHT = 400, 232
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 24, 36
COLOURS = 8  # classes .c0 to .c7 of report.css; a ninth line starts again with dashes
SMOOTH_FROM = 30  # logged values; shorter curves are drawn as they are
NAMES = {"class_": "class", "aria_label": "aria-label", "stroke_width": "stroke-width"}
MAX_DRAWN = 240  # points of one line; more are thinned, extremes kept


@dataclass(frozen=True)
class Line:
    """One curve. `noisy`: faint dots for the values, a line for their moving average."""

    label: str
    points: Sequence[Point]
    noisy: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure: `unit` labels the y axis; `log_ok`: a log scale where the highest is over 30 times the lowest."""

    title: str
    unit: str
    lines: Sequence[Line]
    log_ok: bool = False
    note: str = ""


@dataclass(frozen=True)
class Frame:
    """Data ranges of a chart; y is in decades when `log`."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, step: float) -> float:
        low, high = self.x_range
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        shown = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (shown - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def tag(name: str, content: str = "", **attributes: object) -> Markup:
    """One element, attributes and text escaped (Markup is taken as it is)."""
    listed = "".join(f' {NAMES.get(key, key)}="{escape(v)}"' for key, v in attributes.items())
    return Markup(f"<{name}{listed}>{escape(content)}</{name}>")


def join(parts: Sequence[str]) -> Markup:
    return Markup("").join(parts)


def line_chart(chart: Chart) -> Markup:
    """The chart's SVG. Every line must hold a point."""
    frame = _frame(chart)
    parts = [_grid(frame), tag("text", _unit(chart, frame), x=2, y=12, class_="unit")]
    parts.append(tag("text", "optimizer step", x=WIDTH - RIGHT, y=HEIGHT - 3, class_="unit end"))
    parts += [_curve(line, index, frame) for index, line in enumerate(chart.lines)]
    return svg(join(parts), WIDTH, HEIGHT, describe(chart))


def svg(content: Markup, width: float, height: float, label: str) -> Markup:
    return tag("svg", content, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def describe(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    words = []
    for line in chart.lines:
        (first, start), (last, end) = line.points[0], drawn(line)[-1]
        words.append(f"{line.label} from {short(start)} to {short(end)} over steps {first:g} to {last:g}")
    return f"{chart.title} ({chart.unit}): {'; '.join(words)}"


def short(value: float) -> str:
    """Four significant digits at most, in few characters: 1.234, 12.5k, 3e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` values. At the start, where curves are steep, the window shrinks on both sides;
    at the end it takes the values that are there."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    smoothed = []
    for index, (step, _) in enumerate(points):
        half = min(window // 2, index)
        first, last = index - half, min(index + half, len(points) - 1)
        smoothed.append((step, (sums[last + 1] - sums[first]) / (last + 1 - first)))
    return smoothed


def drawn(line: Line) -> list[Point]:
    """The curve that stands for a line: its moving average, or its values where they are few or exact."""
    n = len(line.points)
    return moving_average(line.points, window_of(n)) if is_smoothed(line) else list(line.points)


def window_of(n: int) -> int:
    """Values in the moving average of a curve of `n`: about a twentieth, odd."""
    return max(5, n // 20) | 1


def thin(points: Sequence[Point], most: int = MAX_DRAWN) -> list[Point]:
    """At most `most` points: the lowest and the highest of each bin, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    bins = most // 2
    kept: list[Point] = []
    for index in range(bins):
        part = points[index * len(points) // bins : (index + 1) * len(points) // bins]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside the range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def is_smoothed(line: Line) -> bool:
    return line.noisy and len(line.points) >= SMOOTH_FROM


def _unit(chart: Chart, frame: Frame) -> str:
    return f"{chart.unit}, log scale" if frame.log else chart.unit


def _frame(chart: Chart) -> Frame:
    steps = [step for line in chart.lines for step, _ in line.points]
    values = [value for line in chart.lines for _, value in line.points]
    low, high = min(values), max(values)
    log = chart.log_ok and low > 0 and high / low > 30
    if log:
        low, high = math.log10(low), math.log10(high)
    elif 0 <= low < 0.4 * high:
        low = 0.0
    largest = max(abs(low), abs(high))
    if largest < 1e-30:
        low, high = 0.0, 1.0
    elif high - low < 1e-3 * largest:  # flat to the eye, and to the labels
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low)
    bottom = low if low == 0 and not log else low - margin
    first, last = min(steps), max(steps)
    if last == first:
        room = max(1.0, 1e-6 * abs(first))  # a float of 16 digits is its own neighbour
        first, last = first - room, last + room
    return Frame((first, last), (bottom, high + margin), log)


def _grid(frame: Frame) -> Markup:
    parts = []
    for value in ticks(*frame.y_range):
        y = (
            HEIGHT
            - BOTTOM
            - (value - frame.y_range[0]) / (frame.y_range[1] - frame.y_range[0]) * (HEIGHT - TOP - BOTTOM)
        )
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        label = short(10**value) if frame.log else short(value)
        parts.append(tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", class_="end"))
    base = HEIGHT - BOTTOM
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    for value in (tick for tick in ticks(*frame.x_range, 6) if tick == int(tick)):
        x = f"{frame.x(value):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=base, y2=base + 4, class_="axis"))
        parts.append(tag("text", short(value), x=x, y=base + 16, class_="mid"))
    return join(parts)


def _curve(line: Line, index: int, frame: Frame) -> Markup:
    colour = f"c{index % COLOURS}"
    dashed = " dashed" if index >= COLOURS else ""
    points = thin(drawn(line))
    curve = _path(points, frame, f"curve {colour}{dashed}")
    if is_smoothed(line):
        return join([_dots(thin(line.points), frame, f"dots faint {colour}", 1.6), curve])
    return join([curve, _dots(points, frame, f"dots {colour}", 2.4)]) if len(points) < SMOOTH_FROM else curve


def _path(points: Sequence[Point], frame: Frame, classes: str) -> Markup:
    spots = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in points)
    return tag("polyline", points=spots, class_=classes)


def _dots(points: Sequence[Point], frame: Frame, classes: str, radius: float) -> Markup:
    # One path of zero-length round strokes is a fifth of the bytes of as many circles.
    spots = "".join(f"M{frame.x(step):.1f} {frame.y(value):.1f}h0" for step, value in points)
    return tag("path", d=spots, stroke_width=2 * radius, class_=classes)


# Load of an expert relative to an equal share, in classes: upper bound, CSS class, words for the legend.
LOAD_CLASSES = (
    (0.0, "dead", "none"),
    (0.25, "cold3", "under ¼"),
    (0.5, "cold2", "¼ to ½"),
    (0.8, "cold1", "½ to 0.8"),
    (1.25, "even", "0.8 to 1.25"),
    (2.0, "hot1", "1.25 to 2"),
    (4.0, "hot2", "2 to 4"),
    (math.inf, "hot3", "over 4"),
)


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    x_label: str,
    label: str,
    marked: Sequence[tuple[int, int]] = (),
) -> Markup:
    """A cell for each layer (row) and column; values are loads relative to an equal share (1 = fair).

    marked: (row, column) of cells that get a dot.
    """
    left, right, top = 34, 14, 14
    cell_w = (WIDTH - left - right) / len(columns)
    cell_h = min(18.0, max(5.0, 260 / len(rows)))
    bottom = top + len(rows) * cell_h
    texts = [tag("text", "layer", x=2, y=9, class_="unit")]
    for row in range(0, len(rows), math.ceil(11 / cell_h)):
        y = top + (row + 0.5) * cell_h + 4
        texts.append(tag("text", rows[row][0], x=left - 5, y=f"{y:.1f}", class_="end"))
    for column in sorted({k * (len(columns) - 1) // 4 for k in range(5)}):
        x = left + (column + 0.5) * cell_w
        texts.append(tag("text", columns[column], x=f"{x:.1f}", y=f"{bottom + 13:.1f}", class_="mid"))
    texts.append(tag("text", x_label, x=WIDTH - right, y=f"{bottom + 27:.1f}", class_="unit end"))
    shapes = _cells([values for _, values in rows], left, top, cell_w, cell_h)
    radius = f"{min(cell_w, cell_h) / 4:.2f}"
    dots = [
        tag("circle", cx=f"{left + (x + 0.5) * cell_w:.1f}", cy=f"{top + (y + 0.5) * cell_h:.1f}", r=radius)
        for y, x in marked
    ]
    marks = [tag("g", join(dots), class_="mark")] * bool(dots)
    return svg(join([shapes, *marks, *texts]), WIDTH, bottom + 32, label)


def _cells(rows: Sequence[Sequence[float]], left: float, top: float, width: float, height: float) -> Markup:
    """One path for each class of load: thousands of cells stay a small page."""
    gap = 1.0 if width > 4 else 0.0
    outlines: dict[str, list[str]] = {}
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            corner = f"M{left + column * width:.1f} {top + row * height:.1f}"
            shape = f"{corner}h{width - gap:.1f}v{height - gap:.1f}h-{width - gap:.1f}z"
            outlines.setdefault(load_class(value), []).append(shape)
    return join([tag("path", d="".join(found), class_=f"load {name}") for name, found in outlines.items()])


def load_class(value: float) -> str:
    bounds = [bound for bound, _, _ in LOAD_CLASSES]
    return LOAD_CLASSES[bisect_left(bounds, max(value, 0.0))][1]


def caption(chart: Chart) -> str:
    """What the reader must know about the drawing: the chart's own note, smoothing, dots left out."""
    parts = [chart.note] if chart.note else []
    smoothed = max((len(line.points) for line in chart.lines if is_smoothed(line)), default=0)
    if smoothed > MAX_DRAWN:
        parts.append(f"Dots: lowest and highest of {2 * smoothed // MAX_DRAWN} values each.")
    elif smoothed:
        parts.append("Dots: logged values.")
    if smoothed:
        parts.append(f"Line: mean over {window_of(smoothed)} values.")
    return " ".join(parts)
