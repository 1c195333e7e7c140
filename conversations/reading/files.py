"""Files -> records, by the kind of file."""

import gzip
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from conversations.errors import ToolkitError
from conversations.reading.json_files import json_records
from conversations.reading.opening import DataFile, file_kind
from conversations.reading.record import Record
from conversations.reading.table_files import arrow_records, csv_records, parquet_records

_READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    ".jsonl": json_records,
    ".ndjson": json_records,
    ".json": json_records,
    ".csv": partial(csv_records, kind=".csv"),
    ".tsv": partial(csv_records, kind=".tsv"),
    ".parquet": parquet_records,
    ".arrow": arrow_records,
}


def open_records(path: DataFile) -> Iterator[Record]:
    """The records of a data file, read as they are asked for.

    What cannot be read is a record with a `problem`.

    Raises:
        ToolkitError: at the call, where there is no such file or its kind is not known; while reading, a file that
            cannot be opened or decompressed.
    """
    return _records(path, _READERS[file_kind(path)])


def _records(path: DataFile, reader: Callable[[DataFile], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error, OSError, NotImplementedError) as error:
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
    except RuntimeError as error:
        if not isinstance(path, zipfile.Path):
            raise
        raise ToolkitError(f"{path}: cannot be read: {error}") from error
