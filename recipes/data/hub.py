"""Hugging Face Hub data sets: their rows are streamed once to a JSON-lines file."""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.row import without_nulls
from recipes.data.splits import Split
from recipes.files import atomic_path


def hub_file(path: str, split: Split, folder: Path, key: str) -> Path:
    """The file with the rows of OWNER/NAME or OWNER/NAME:CONFIG; written if it does not exist.

    Memory does not grow with the data set. For a split by row number, no further rows are fetched.

    Raises:
        ToolkitError: the data set does not exist or cannot be fetched.
    """
    name, _, config = path.partition(":")
    split_name = split.name or "train"
    numbers = "" if split.rows is None else "-".join(str(end) for end in ("", *split.rows) if end is not None)
    label = "-".join(part for part in (name, config, split_name) if part) + numbers
    exact = sha256(json.dumps([name, config, split_name, split.rows]).encode()).hexdigest()[:8]
    file = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', label)}-{exact}.jsonl"
    if not file.exists():
        _write(file, _rows(name, config or None, split_name, split, key), name, key)
    return file


def _rows(name: str, config: str | None, split_name: str, split: Split, key: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split_name, streaming=True)
    except Exception as error:  # any error from the hub, the network or a missing name is for the user to fix
        raise ToolkitError(
            f"{key}.path: no file {name}, and no hub data set of this name can be loaded: {_one_line(error)}"
        ) from error
    return rows if split.rows is None else islice(rows, *split.rows)


def _write(file: Path, rows: Iterable[dict[str, Any]], name: str, key: str) -> None:
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as out:
        try:
            for row in rows:
                row = {name: without_nulls(value) for name, value in row.items()}
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        except Exception as error:  # as above; the rows come over the network
            raise ToolkitError(f"{key}.path: reading the hub data set {name} failed: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
