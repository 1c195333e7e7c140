"""Handles a full disk: keeps the last complete checkpoint and reports how much space was needed."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

UNFINISHED = ".unfinished"  # the Trainer writes checkpoints in here; they are moved to their name when complete
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of safetensors (Rust) for a full disk; and, in _WRITE_FAILED, of torch.save for any failed write.
_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded")
_NOTHING = 1 << 20  # bytes; less free space than this counts as none
_WRITE_FAILED = ("write failed", "unexpected pos")


@contextmanager
def full_disk_explained(run_dir: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Context manager for code that writes: turns a full disk into a clear error and removes partial files.

    needed: returns the number of bytes to be written.

    Raises:
        ModelError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0
        half_written = sum(path.stat().st_size for path in (run_dir / UNFINISHED).rglob("*") if path.is_file())
        room = free + half_written
        if not is_full(error, room < needed() or free < _NOTHING):
            raise
        shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
        mb, room_mb = needed() / 1e6, room / 1e6
        raise ModelError(
            f"the disk of {run_dir} is full: a checkpoint takes about {mb:,.1f} MB and {room_mb:,.1f} MB are free; "
            f"{whole_checkpoints(run_dir)}. Free some space and run the same command again, or lower "
            "training.save_total_limit, or choose another output_dir"
        ) from error


def is_full(error: BaseException | None, short: bool) -> bool:
    """Whether an error means a full disk. short: whether too little space is free, so that any failed write counts."""
    while error is not None:
        text = str(error)
        if (isinstance(error, OSError) and error.errno in _FULL) or any(words in text for words in _WORDS):
            return True
        if short and any(words in text for words in _WRITE_FAILED):
            return True
        error = error.__cause__ or error.__context__
    return False


def checkpoint_bytes(model: Any, optimizer: Any) -> int:
    """The approximate size of a checkpoint in bytes: its weights, and two optimizer values per trained one."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    saved = trained if hasattr(model, "peft_config") else parameters
    size = sum(p.numel() * p.element_size() for p in saved)
    state = optimizer.state.values() if optimizer is not None else ()
    optimizer_bytes = sum(
        t.numel() * t.element_size() for entry in state for t in entry.values() if isinstance(t, torch.Tensor)
    )
    return size + max(optimizer_bytes, 8 * sum(p.numel() for p in trained))


def whole_checkpoints(run_dir: Path) -> str:
    """ "checkpoint-20 is complete", or that there is none yet."""
    checkpoints = checkpoints_of(run_dir)
    return f"{checkpoints[-1].name} is complete" if checkpoints else "there is no checkpoint yet"


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The directories of a run that are named checkpoint-N, sorted by step."""
    folders = run_dir.glob("checkpoint-*")
    return sorted((folder for folder in folders if checkpoint_step(folder) >= 0), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The step of a directory named checkpoint-N; -1 for another name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != folder.name else -1
