"""Checks that a checkpoint is complete, by the recorded size and CRC-32 of each of its files.

If a file is missing or truncated, the Trainer resumes with different results, often silently.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoints.full_disk import checkpoint_step, checkpoints_of
from ..errors import ModelError
from .run_files import TRAINER_STATE_FILE, write_json

SUMS_FILE = "checksums.json"
_CHUNK = 1 << 22


def write_sums(folder: Path) -> None:
    """Write the sizes and checksums of all files of a checkpoint into it, after all other files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    with ThreadPoolExecutor() as pool:
        sums = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(_sum, files), strict=True))
    write_json(folder / SUMS_FILE, sums)


def damage(folder: Path, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is complete and undamaged. thorough: read all
    files, instead of looking at their sizes."""
    if not folder.is_dir():
        return "it is not there"
    try:
        sums = json.loads((folder / SUMS_FILE).read_text(encoding="utf-8"))
        recorded = {str(name): (int(entry["bytes"]), str(entry["crc32"])) for name, entry in sums.items()}
    except FileNotFoundError:
        return f"{SUMS_FILE} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{SUMS_FILE} is damaged"
    if not recorded:
        return f"{SUMS_FILE} is damaged"
    with ThreadPoolExecutor() as pool:
        faults = pool.map(lambda name: _fault(folder, name, *recorded[name], thorough), sorted(recorded))
        return next((fault for fault in faults if fault), None)


def check_whole(checkpoint: Path, best: bool = False) -> None:
    """Raise ModelError unless a run can resume from a checkpoint; the message names the newest one that it can resume
    from.

    best: also check the best checkpoint, which the run loads at the end of training.
    """
    if fault := damage(checkpoint):
        step = checkpoint_step(checkpoint)
        older = [folder for folder in reversed(checkpoints_of(checkpoint.parent)) if checkpoint_step(folder) < step]
        complete = next((folder for folder in older if damage(folder) is None), None)
        broken = [checkpoint, *(older[: older.index(complete)] if complete else older)]
        names = ", ".join(str(folder) for folder in broken)
        then = (
            f"resumes from {complete.name}, the newest complete one"
            if complete
            else "starts over: no other is complete"
        )
        raise ModelError(f"{checkpoint}: {fault}; delete or move {names}, and the same command {then}")
    chosen = _best(checkpoint) if best else None
    if chosen is not None and chosen != checkpoint and (fault := damage(chosen)):
        raise ModelError(
            f"{chosen}: {fault}; training.load_best_model_at_end needs this checkpoint, the best so far: put it back, "
            "or choose another output_dir"
        )


def _best(checkpoint: Path) -> Path | None:
    state = json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def _fault(folder: Path, name: str, size: int, crc: str, thorough: bool) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    actual = path.stat().st_size
    if actual < size:
        return f"{name} is cut short ({actual:,} of {size:,} bytes)"
    if not thorough:
        return None if actual == size else f"{name} is damaged"
    try:
        return None if _sum(path) == {"bytes": size, "crc32": crc} else f"{name} is damaged"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _sum(path: Path) -> dict[str, Any]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
