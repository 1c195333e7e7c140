"""Where the time of an optimizer step goes: to the rollout, the rewards, the reference or the update."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

PHASES: tuple[str, ...] = ("rollout", "rewards", "reference", "update")


class PhaseClock(TrainerCallback):
    """Seconds of each phase, from a step's first micro-batch until its optimizer is done.

    Phases nest: time counts for the innermost one. What is in none of them is the update's. A step that trains on
    earlier rollouts has 0 seconds in the other phases.

    Args:
        device: that of the model; on a GPU each phase waits for its kernels, so that none pays for another's.
        report: is given the seconds of each phase when a step ends.
    """

    def __init__(self, device: torch.device, report: Callable[[dict[str, float]], None]):
        self.device = device
        self.report = report
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.open = ["update"]
        self.since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._count()
        self.open.append(name)
        try:
            yield
        finally:
            self._count()
            self.open.pop()

    def _count(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds, self.since = dict.fromkeys(PHASES, 0.0), time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._count()
        self.report(self.seconds)
