"""How a list of lengths is spread: bins of one round width, as lines of text and as a drawing."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recipes.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, join, short, svg, tag, ticks

_BINS = 12
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Bin:
    """How many lengths (scaled to all rows) lie from `low` to `high`, both included."""

    low: int
    high: int
    count: int


def bins(lengths: Sequence[int], scale: float = 1) -> list[Bin]:
    """About a dozen bins from 0 to the longest; each of `lengths` stands for `scale` rows."""
    width = _round_width((max(lengths) + 1) / _BINS)
    found = Counter(length // width for length in lengths)
    return [Bin(i * width, (i + 1) * width - 1, round(found[i] * scale)) for i in range(max(found) + 1)]


def text_lines(spread: Sequence[Bin]) -> list[str]:
    """A bar of # for each bin, from the first that is not empty."""
    first = next(index for index, each in enumerate(spread) if each.count)
    spread = spread[first:]
    most = max(each.count for each in spread)
    edges = [f"{each.low:,}-{each.high:,}" for each in spread]
    return [
        f"{edge:>{max(map(len, edges))}} {each.count:>{len(f'{most:,}')},} " + "#" * math.ceil(_BAR * each.count / most)
        for edge, each in zip(edges, spread, strict=True)
    ]


def drawing(spread: Sequence[Bin], max_length: int | None, label: str) -> Markup:
    """Bars over tokens; a line where rows become too long."""
    longest = spread[-1].high + 1
    most = max(each.count for each in spread)
    x_scale, y_scale = (WIDTH - LEFT - RIGHT) / longest, (HEIGHT - TOP - BOTTOM) / most
    base = HEIGHT - BOTTOM
    parts = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis")]
    for value in ticks(0, most, 4):
        y = f"{base - value * y_scale:.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(value), x=LEFT - 6, y=f"{base - value * y_scale + 4:.1f}", class_="end"))
    for each in spread:
        x, width = LEFT + each.low * x_scale, (each.high + 1 - each.low) * x_scale
        height = each.count * y_scale
        box = {"x": f"{x:.1f}", "y": f"{base - height:.1f}", "width": f"{width - 1:.1f}", "height": f"{height:.1f}"}
        title = tag("title", f"{each.low:,}-{each.high:,} tokens: {each.count:,}")
        parts.append(tag("rect", title, **box, class_="box"))
    for value in ticks(0, longest, 6):
        parts.append(tag("text", short(value), x=f"{LEFT + value * x_scale:.1f}", y=base + 16, class_="mid"))
    if max_length is not None and max_length <= longest:
        x = f"{LEFT + max_length * x_scale:.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=base, class_="limit"))
    parts.append(tag("text", "rows", x=2, y=12, class_="unit"))
    parts.append(tag("text", "tokens", x=WIDTH - RIGHT, y=HEIGHT - 3, class_="unit end"))
    return svg(join(parts), WIDTH, HEIGHT, label)


def _round_width(rough: float) -> int:
    """The next whole number of 1, 2 or 5 times a power of ten."""
    power = 10 ** max(0, math.floor(math.log10(max(rough, 1))))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
