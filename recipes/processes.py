"""Which of the processes of a launch this is, and how it was started. `torchrun` and `accelerate launch` tell by
environment variables."""

import os
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from recipes.secret_keys import without_secrets

T = TypeVar("T")


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


def main_first(do: Callable[[], T]) -> T:
    """Let the main process go first: what it writes on the way, the others find."""
    if is_main():
        done = do()
        wait_for_all()
        return done
    wait_for_all()
    return do()


def command_line() -> str:
    """The command as it could be typed again, without the directory of the program and without secrets."""
    program = Path(sys.argv[0]).name
    program = "dsv2" if program == "cli.py" else program
    return without_secrets(" ".join([program, *(shlex.quote(word) for word in sys.argv[1:])]))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
