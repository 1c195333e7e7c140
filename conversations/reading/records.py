"""The records of a data file of any kind, before they are converted."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.data_file import DataFile, Record
from conversations.reading.json_files import json_records
from conversations.reading.locating import locate
from conversations.reading.table_files import arrow_records, csv_records, parquet_records

# Kind of file -> its reader.
_READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), json_records),
    **dict.fromkeys((".csv", ".tsv"), csv_records),
    ".parquet": parquet_records,
    ".arrow": arrow_records,
}


def records_of(file: DataFile) -> Iterator[Record]:
    """Yield the records of a file lazily; one that cannot be read has a `problem`.

    Raises ToolkitError for a file that cannot be opened or decompressed.
    """
    try:
        yield from _READERS[file.kind](file)
    # MemoryError: a damaged length in an Arrow file is an attempt to allocate as much.
    except (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, NotImplementedError, OSError) as error:
        raise ToolkitError(f"{file.path}: cannot be read: {error}") from error
    except RuntimeError as error:  # an encrypted member of a .zip
        if not isinstance(file.path, zipfile.Path):
            raise
        raise ToolkitError(f"{file.path}: cannot be read: {error}") from error


def raw_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a path as it is written: "law.jsonl:17" and an object.

    Raises:
        ToolkitError: a missing or unreadable file, or a row that is not an object.
    """
    for file in locate(Path(path)).files:
        for record in records_of(file):
            if record.beside:
                continue
            if record.problem:
                raise ToolkitError(f"{file.path}:{record.line}: {record.place}{record.problem}")
            yield f"{Path(str(file.path)).name}:{record.line}", record.value
