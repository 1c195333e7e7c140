"""A progress bar, shown only if the output is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(label: str, total: int | None, unit: str, shows: bool = True) -> Iterator[Callable[[int], Any]]:
    """Draw a progress bar and yield a function that advances it by a count. shows: if false, nothing is drawn."""
    from tqdm import tqdm

    with tqdm(
        desc=label,
        total=total,
        unit=f" {unit}",
        disable=None if shows else True,
        file=sys.__stderr__,
        leave=False,
        dynamic_ncols=True,
    ) as drawn:
        yield drawn.update
