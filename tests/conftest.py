"""What all tests share."""

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The models here are so small that more threads only wait for each other.
torch.set_num_threads(1)

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def no_workers_left() -> Iterator[None]:
    """Ends the processes that judge answers, and their threads: what forks later must have none. Not imported here,
    since the model's tests run where only the model's own packages are installed."""
    yield
    workers = sys.modules.get("conversations.answers.workers")
    if workers and workers.shared_workers.cache_info().currsize:
        workers.shared_workers().close()
        workers.shared_workers.cache_clear()
