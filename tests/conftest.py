"""What all tests share."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The models here are so small that more threads only wait for each other, also in the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What is imported and collected stays. Garbage collection, for which every Trainer asks, would look through it
    again and again, which takes longer than many of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_workers_left() -> Iterator[None]:
    """Ends the processes that judge answers, and their threads: what forks later must have none. Not imported here,
    since the model's tests run where only the model's own packages are installed."""
    yield
    workers = sys.modules.get("conversations.answers.workers")
    if workers and workers.shared_workers.cache_info().currsize:
        workers.shared_workers().close()
        workers.shared_workers.cache_clear()
