"""Files -> records, by the kind of file."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from conversations.errors import ToolkitError
from conversations.json_records import json_records
from conversations.opening import file_kind
from conversations.record import Record
from conversations.table_records import csv_records, parquet_records

_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": json_records,
    ".json": json_records,
    ".csv": partial(csv_records, kind=".csv"),
    ".tsv": partial(csv_records, kind=".tsv"),
    ".parquet": parquet_records,
}


def open_records(path: Path) -> Iterator[Record]:
    """The records of a data file, read as they are asked for.

    What cannot be read is a record with a `problem`.

    Raises:
        ToolkitError: at the call, where there is no such file or its kind is not known; while reading, a file that
            cannot be opened or decompressed.
    """
    return _records(path, _READERS[file_kind(path)])


def _records(path: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
