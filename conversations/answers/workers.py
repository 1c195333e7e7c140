"""Runs calls in parallel processes; one that takes too long is killed without affecting the others. No torch."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cache
from typing import Any

from pebble import ProcessExpired, ProcessPool

# What `Workers.map` returns for a call that was stopped at its time limit, or whose process died.
TooLong, Died = FutureTimeoutError, ProcessExpired


def cores() -> int:
    """This process's share of the cores among the processes of one launch."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Workers:
    """Up to `count` processes, started when needed and kept.

    They are spawned, not forked: this process may hold gigabytes and threads.
    """

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPool(max_workers=count, context=context, initializer=_leave_signals)

    def map(
        self, function: Callable[[Sequence[Any]], list[Any]], items: Sequence[Any], size: int, seconds: float
    ) -> list[Any]:
        """Calls the function on `size` items at a time and returns one result per item, in order: an exception for an
        item whose call raised it or was stopped. A call of several items that fails, or takes longer than `seconds`, is
        repeated for each item alone."""
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
        """Ends the processes, whatever they are doing."""
        self.pool.stop()
        self.pool.join()


@cache
def shared_workers() -> Workers:
    """The workers shared by all rules."""
    return Workers(cores())


def _leave_signals() -> None:
    """Ignores Ctrl-C, which a terminal sends to all processes: the run's main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
