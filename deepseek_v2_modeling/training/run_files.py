"""Reads and writes the files of a run directory: JSON lines files that grow during the run, and JSON files."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TRAINER_STATE_FILE = "trainer_state.json"  # the Trainer's state in a checkpoint


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else value


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON line per row, and create the folder if necessary; without rows a no-op.

    If the disk is full, nothing is appended, and the OSError names the file.
    """
    text = _as_lines(rows)
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_link(path)
    old_size = path.stat().st_size if path.is_file() else None
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True) if old_size is None else os.truncate(path, old_size)
        error.filename = error.filename or str(path)
        raise


def refuse_link(path: Path) -> None:
    """Raise ModelError for a symbolic link: writing would change a file outside of the run."""
    if path.is_symlink():
        raise ModelError(f"{path} is a symbolic link; remove it, or choose another output_dir")


def cut_file(path: Path, size: int) -> None:
    """Truncate a file to its first `size` bytes, without an incomplete last line. A missing file stays missing."""
    refuse_link(path)
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read(size)
        file.truncate(content.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line, without lines that a crash left incomplete; empty if the file is
    missing."""
    refuse_link(path)
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode("utf-8"))
            rows += [row] if isinstance(row, dict) else []
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON line per row, atomically."""
    _write(path, _as_lines(rows))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically."""
    _write(path, json.dumps(_plain(value), ensure_ascii=False, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
