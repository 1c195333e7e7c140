"""Chooses how many rows of each source go into a mixture, and which."""

import random
import re
from array import array
from collections.abc import Sequence
from pathlib import PurePath

from conversations.sections import DataSource


def rows_used(rows: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """The number of rows to use from each source, given how many it has.

    Without weights, all rows are used. Otherwise the numbers are proportional to the weights (1 by default), and the
    source with the largest weight (if tied, the one with the most rows) contributes each row once.
    """
    if all(weight is None for weight in weights):
        return list(rows)
    shares = [1.0 if weight is None else weight for weight in weights]
    main = max(range(len(rows)), key=lambda source: (shares[source], rows[source]))
    return [max(1, round(rows[main] * share / shares[main])) for share in shares]


def chosen(rows: int, count: int, rng: random.Random) -> array:
    """Choose `count` of the row numbers 0 to `rows` - 1; how often each occurs differs by at most one."""
    repeats, rest = divmod(count, rows)
    order = array("Q", range(rows)) * repeats
    order.extend(sorted(rng.sample(range(rows), rest)))
    return order


def source_names(entries: Sequence[DataSource]) -> list[str]:
    """A short name for each source, for metrics: that of its file, data set or generator; repeats get `_2`, `_3`."""
    names: list[str] = []
    for entry in entries:
        stem = PurePath(re.sub("^(?:tiny|reasoning_gym):", "", entry.path).partition("?")[0]).name.partition(".")[0]
        name = re.sub(r"\W+", "_", stem).strip("_") or "source"
        before = sum(re.fullmatch(rf"{re.escape(name)}(_\d+)?", earlier) is not None for earlier in names)
        names.append(f"{name}_{before + 1}" if before else name)
    return names
