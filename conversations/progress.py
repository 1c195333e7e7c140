"""A bar of what has been done; none where the output is no terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(what: str, total: int | None, unit: str, shows: bool = True) -> Iterator[Callable[[int], Any]]:
    """Draws on the terminal; gives a function that counts on. shows: false draws nothing."""
    from tqdm import tqdm

    with tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        disable=None if shows else True,
        file=sys.__stderr__,
        leave=False,
        dynamic_ncols=True,
    ) as drawn:
        yield drawn.update
