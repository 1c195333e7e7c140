"""Which of the processes of a launch this is. `torchrun` and `accelerate launch` tell by environment variables."""

import os
from typing import Any


def rank() -> int:
    """Number of this process, 0 when there is one only."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def say(*parts: Any) -> None:
    """Print a message, once for all processes."""
    if is_main():
        print(*parts, flush=True)


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available())
    torch.distributed.barrier()
