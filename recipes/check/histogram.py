"""Histogram of token lengths: bins of equal, round width, and the same as lines of text."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_BINS = 12
_BAR = 40  # characters in the longest bar


class Bin(NamedTuple):
    """Number of rows (scaled up if only a sample was measured) with `low` to `high` tokens, inclusive."""

    low: int
    high: int
    rows: int


def bins(lengths: Sequence[int], scale: float = 1) -> list[Bin]:
    """About a dozen bins from 0 to the longest; each of `lengths` stands for `scale` rows."""
    width = _round_width((max(lengths) + 1) / _BINS)
    counts = Counter(length // width for length in lengths)
    return [Bin(i * width, (i + 1) * width - 1, round(counts[i] * scale)) for i in range(max(counts) + 1)]


def text_lines(spread: Sequence[Bin]) -> list[str]:
    """A bar of # for each bin, starting at the first non-empty one."""
    first = next(index for index, bin in enumerate(spread) if bin.rows)
    spread = spread[first:]
    most = max(bin.rows for bin in spread)
    edges = [f"{bin.low:,}-{bin.high:,}" for bin in spread]
    return [
        f"{edge:>{max(map(len, edges))}} {bin.rows:>{len(f'{most:,}')},} " + "#" * math.ceil(_BAR * bin.rows / most)
        for edge, bin in zip(edges, spread, strict=True)
    ]


def _round_width(rough: float) -> int:
    """The next integer of the form 1, 2 or 5 times a power of ten."""
    power = 10 ** max(0, math.floor(math.log10(max(rough, 1))))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough)
