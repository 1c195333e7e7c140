"""CSV, TSV and parquet files -> records. CSV is read as it goes; of a parquet file a batch of rows is held."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.opening import open_bytes, open_seekable
from conversations.record import Record, is_utf8

_LARGEST_FIELD = 64 << 20  # characters; csv's own limit is 131,072
_BATCH = 512
_BOM = "\ufeff"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def csv_records(path: Path, kind: str) -> Iterator[Record]:
    """The rows of a .csv or .tsv file under the names in its first line; all values are strings.

    Quotes are those of CSV in both. A field may go over several lines.

    Raises:
        ToolkitError: a first line that is no UTF-8, with empty names, or with one name twice.
    """
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(_LARGEST_FIELD)
        reader = csv.reader(text, delimiter=DELIMITERS[kind], strict=True)
        yield from _csv_rows(path, reader, DELIMITERS[kind])


def _csv_rows(path: Path, reader: Any, delimiter: str) -> Iterator[Record]:
    names: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            span = f"; by its quotes this row ends on line {reader.line_num}" if reader.line_num > line else ""
            yield Record(line, "", {}, f"broken quotes: {error}{span}")
            continue
        if not fields:
            continue
        if not names:
            names = _checked_names(path, fields)
            continue
        written = delimiter.join(fields)
        yield Record(line, written, dict(zip(names, fields, strict=False)), _csv_problem(names, fields, written))


def _checked_names(path: Path, names: list[str]) -> list[str]:
    if not is_utf8("".join(names)):
        raise ToolkitError(f"{path}:1: not valid UTF-8; write the file anew as UTF-8")
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice or "" in names:
        wrong = f"names {twice[0]!r} twice" if twice and twice[0] else "has an empty name"
        raise ToolkitError(f"{path}:1: the first line {wrong}; it must name the columns")
    return names


def _csv_problem(names: list[str], fields: list[str], written: str) -> str | None:
    if len(fields) != len(names):
        return f"{len(fields)} fields where the first line names {len(names)} columns"
    if fields[0].startswith(_BOM):
        return "a byte order mark in the middle of the file"
    return None if is_utf8(written) else "not valid UTF-8"


def parquet_records(path: Path) -> Iterator[Record]:
    """The rows of a .parquet file, numbered from 1.

    Raises:
        OSError: it is no parquet file, or a damaged one.
    """
    import pyarrow
    from pyarrow import parquet

    with open_seekable(path) as file:
        try:
            batches = parquet.ParquetFile(file).iter_batches(batch_size=_BATCH)
            number = 0
            for batch in batches:
                for value, problem in _parquet_rows(batch):
                    number += 1
                    yield Record(number, None, value, problem)
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from error


def _parquet_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The batch's rows; one by one where one of them is no UTF-8."""
    try:
        yield from ((row, None) for row in batch.to_pylist())
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0], None
            except UnicodeDecodeError:
                yield {}, "not valid UTF-8"
