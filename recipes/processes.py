"""The rank of this process within a launch, and its command line. `torchrun` and `accelerate launch` set environment
variables."""

import os
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from recipes.secret_keys import without_secrets

T = TypeVar("T")


def rank() -> int:
    """Rank of this process; 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes in the launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def say(*parts: Any) -> None:
    """Print a message from the main process only."""
    if is_main():
        print(*parts, flush=True)


def wait_for_all() -> None:
    """Wait until every process has reached this point."""
    if world_size() == 1:
        return
    join_processes()
    import torch

    from deepseek_v2_modeling.training import at

    with at("waiting for all processes"):
        torch.distributed.barrier()


def join_processes(patience: float | None = None) -> None:
    """Set up communication with the other processes of the launch, once. A process that waits longer for another one
    than `patience` says, in seconds, ends with an error that says what it was doing."""
    import torch
    from accelerate import PartialState

    from deepseek_v2_modeling.training import PATIENCE, wait_at_most

    if not torch.distributed.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=patience or PATIENCE))
    if patience is not None:
        wait_at_most(patience)


def main_first(do: Callable[[], T]) -> T:
    """Run `do` in the main process first, then in the others, which find the files that it has written."""
    if is_main():
        result = do()
        wait_for_all()
        return result
    wait_for_all()
    return do()


def command_line() -> str:
    """The command as it could be typed again, without the program's directory and without secrets."""
    program = Path(sys.argv[0]).name
    program = "dsv2" if program == "cli.py" else program
    return without_secrets(" ".join([program, *(shlex.quote(word) for word in sys.argv[1:])]))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
