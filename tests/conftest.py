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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the other processes have work until they end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    leave_to_stay()


def leave_to_stay() -> None:
    """What is imported, collected or cached by now stays. Garbage collection, for which every Trainer asks, would look
    through it again and again, which takes longer than many of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    """Ends the processes that judge answers, and their threads: what forks later must have none. Not imported here,
    since the model's tests run where only the model's own packages are installed."""
    yield
    workers = sys.modules.get("conversations.answers.workers")
    if workers and workers.shared_workers.cache_info().currsize:
        workers.shared_workers().close()
        workers.shared_workers.cache_clear()
    leave_to_stay()
