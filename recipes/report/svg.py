"""Drawings as inline SVG: no scripts, no fonts; colours are CSS classes of report.css, for light and dark alike.

Lengths are in units of the view box, which a screen of 400 px or more shows at about one pixel each. docs/log.md says
what libraries were tried in place of this file.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from recipes.report.charts import SMOOTH_FROM, STEP, Chart, Line, every, thin
from recipes.report.metrics import Point
from recipes.results.words import short

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 24, 40
BASE = HEIGHT - BOTTOM  # where the x axis lies
COLOURS = 8  # classes .c0 to .c7; a ninth line starts again with dashes
NAMES = {"class_": "class", "aria_label": "aria-label", "stroke_width": "stroke-width"}

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


@dataclass(frozen=True)
class Drawn:
    """A drawn chart with its legend: (CSS classes, label, where the curve ends or "") of each line."""

    title: str
    drawing: Markup
    legend: Sequence[tuple[str, str, str]]
    note: str


@dataclass(frozen=True)
class Frame:
    """Data ranges of a chart; y is in decades when `log`."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height(math.log10(value) if self.log else value)

    def height(self, shown: float) -> float:
        """The y coordinate of a value, or of a decade on a logarithmic scale."""
        low, high = self.y_range
        return BASE - (shown - low) / (high - low) * (BASE - TOP)


def draw(chart: Chart) -> Drawn:
    """The chart as a figure of the page. Every line must hold a point."""
    frame = _frame(chart)
    unit = f"{chart.unit}, log scale" if frame.log else chart.unit
    curves = [_curve(line, _colour(index), frame) for index, line in enumerate(chart.lines)]
    drawing = svg([*_axes(frame, unit, chart.over), *curves], HEIGHT, chart.in_words)
    ends = [short(line.curve[-1][1]) if chart.over == STEP else "" for line in chart.lines]
    classes = [f"{_colour(index)}{' guide' if line.guide else ''}" for index, line in enumerate(chart.lines)]
    legend = [(classes[index], line.label, ends[index]) for index, line in enumerate(chart.lines)]
    return Drawn(chart.title, drawing, legend, chart.caption)


def histogram(bars: Sequence[tuple[int, int, int]], limit: int | None, label: str) -> Markup:
    """A bar for each (lowest, highest, rows) by number of tokens, and a line at `limit` if rows reach it."""
    longest = bars[-1][1] + 1
    frame = Frame((0, longest), (0, max(rows for _, _, rows in bars)))
    parts = _axes(frame, "rows", "tokens")
    for low, high, rows in bars:
        width, top = frame.x(high + 1) - frame.x(low) - 1, frame.y(rows)
        box = {"x": f"{frame.x(low):.1f}", "y": f"{top:.1f}", "width": f"{width:.1f}", "height": f"{BASE - top:.1f}"}
        parts.append(tag("rect", tag("title", f"{low:,}-{high:,} tokens: {rows:,}"), **box, class_="box"))
    if limit is not None and limit <= longest:
        x = f"{frame.x(limit):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=BASE, class_="limit"))
    return svg(parts, HEIGHT, label)


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]],
    columns: Sequence[str],
    x_label: str,
    label: str,
    marked: Sequence[tuple[int, int]] = (),
    corner: str = "layer",
) -> Markup:
    """A cell for each layer (row, or what `corner` names) and column; values are loads relative to an equal share (1 =
    fair).

    marked: (row, column) of cells that get a dot.
    """
    left, right, top = 34, 14, 14
    cell_w = (WIDTH - left - right) / len(columns)
    cell_h = min(18.0, max(5.0, 260 / len(rows)))
    bottom = top + len(rows) * cell_h
    texts = [tag("text", corner, x=2, y=9, class_="unit")]
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
    return svg([*shapes, *marks, *texts], bottom + 32, label)


def load_class(value: float) -> str:
    """The CSS class of a load relative to an equal share."""
    bounds = [bound for bound, _, _ in LOAD_CLASSES]
    return LOAD_CLASSES[bisect_left(bounds, max(value, 0.0))][1]


def svg(parts: Iterable[Markup], height: float, label: str) -> Markup:
    return tag("svg", join(parts), viewBox=f"0 0 {WIDTH} {height:g}", role="img", aria_label=label)


def tag(name: str, content: str = "", **attributes: object) -> Markup:
    """One element, attributes and text escaped (Markup is taken as it is)."""
    listed = "".join(f' {NAMES.get(key, key)}="{escape(v)}"' for key, v in attributes.items())
    return Markup(f"<{name}{listed}>{escape(content)}</{name}>")


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside the range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _colour(index: int) -> str:
    return f"c{index % COLOURS}{' dashed' if index >= COLOURS else ''}"


def _frame(chart: Chart) -> Frame:
    steps = [step for line in chart.lines for step, _ in line.points]
    values = [value for line in chart.lines for _, value in line.points]
    values += [end for line in chart.lines for bar in line.bars for end in bar]
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
    if last - first <= max(1e-6 * max(abs(first), abs(last)), 1e-30):  # adjacent 16-digit floats would be equal
        room = max(1.0, 1e-6 * abs(first))
        first, last = first - room, last + room
    return Frame((first, last), (bottom, high + margin), log)


def _axes(frame: Frame, y_label: str, x_label: str) -> list[Markup]:
    """Grid lines with their values, the x axis with its values (whole steps only), and the axis labels."""
    parts = []
    levels = ticks(*frame.y_range)
    values = [10**level for level in levels] if frame.log else levels
    along = [tick for tick in ticks(*frame.x_range, 6) if x_label != STEP or tick == int(tick)]
    for level, text in zip(levels, [*map(short, values)], strict=True):
        y = frame.height(level)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        parts.append(tag("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", class_="end"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=BASE, y2=BASE, class_="axis"))
    for value, text in zip(along, [*map(short, along)], strict=True):
        x = f"{frame.x(value):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=BASE, y2=BASE + 4, class_="axis"))
        parts.append(tag("text", text, x=x, y=BASE + 19, class_="mid"))
    parts.append(tag("text", y_label, x=2, y=12, class_="unit"))
    parts.append(tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - 3, class_="unit end"))
    return parts


def _curve(line: Line, colour: str, frame: Frame) -> Markup:
    if line.scattered:
        return _dots(line.points[:: every(len(line.points))], frame, f"dots scattered {colour}", 2.0)
    points = thin(line.curve)
    spots = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in points)
    curve = tag("polyline", points=spots, class_=f"curve {colour}{' guide' if line.guide else ''}")
    if line.guide:
        return curve
    curve = _bars(line, frame, colour) + curve if line.bars else curve
    if line.is_smoothed:
        return _dots(thin(line.points), frame, f"dots faint {colour}", 1.6) + curve
    return curve + _dots(points, frame, f"dots {colour}", 2.4) if len(points) < SMOOTH_FROM else curve


def _bars(line: Line, frame: Frame, colour: str) -> Markup:
    """The interval of each point, as a vertical stroke."""
    strokes = "".join(
        f"M{frame.x(x):.1f} {frame.y(low):.1f}V{frame.y(high):.1f}"
        for (x, _), (low, high) in zip(line.points, line.bars, strict=True)
    )
    return tag("path", d=strokes, class_=f"curve whisker {colour}")


def _dots(points: Sequence[Point], frame: Frame, classes: str, radius: float) -> Markup:
    # One path of zero-length round strokes takes a fifth of the bytes of the circles.
    spots = "".join(f"M{frame.x(step):.1f} {frame.y(value):.1f}h0" for step, value in points)
    return tag("path", d=spots, stroke_width=2 * radius, class_=classes)


def _cells(rows: Sequence[Sequence[float]], left: float, top: float, width: float, height: float) -> list[Markup]:
    """One path per load class, so that thousands of cells still make a small page."""
    gap = 1.0 if width > 4 else 0.0
    outlines: dict[str, list[str]] = {}
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            corner = f"M{left + column * width:.1f} {top + row * height:.1f}"
            shape = f"{corner}h{width - gap:.1f}v{height - gap:.1f}h-{width - gap:.1f}z"
            outlines.setdefault(load_class(value), []).append(shape)
    return [tag("path", d="".join(shapes), class_=f"load {name}") for name, shapes in outlines.items()]
