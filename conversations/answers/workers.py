"""Calls in processes of their own, side by side: one that takes too long is killed, and the others go on. No torch."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cache
from typing import Any

from pebble import ProcessExpired, ProcessPool

# What `Workers.map` gives for a call that was ended, or whose process ended.
TooLong, Died = FutureTimeoutError, ProcessExpired


def cores() -> int:
    """Cores for this process, of those that the processes of one launch share."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Workers:
    """Up to `count` processes, started when they are needed, which stay.

    They are new ones, not copies of this one, which may hold gigabytes and threads.
    """

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(max_workers=count, context=context, initializer=_leave_signals)

    def map(
        self, function: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any], size: int, seconds: float
    ) -> list[Any]:
        """What the function gives for `size` items at a time, item by item; the exception instead, for one whose call
        raised it or was ended. A call of several items that fails, or takes longer than `seconds`, is made again for
        each alone."""
        chunks = [items[start : start + size] for start in range(0, len(items), size)]
        calls = [self.pool.schedule(function, [chunk], timeout=seconds) for chunk in chunks]
        results: list[Any] = []
        for chunk, call in zip(chunks, calls, strict=True):
            try:
                results += call.result()
            except Exception as error:
                results += [error] if len(chunk) == 1 else self.map(function, chunk, 1, seconds)
        return results

    def close(self) -> None:
        """Ends them, whatever they do."""
        self.pool.stop()
        self.pool.join()


@cache
def shared_workers() -> Workers:
    """Those of the rules."""
    return Workers(cores())


def _leave_signals() -> None:
    """Ctrl-C goes to all processes of a terminal: the run's own one decides what becomes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
