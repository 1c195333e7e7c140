"""Reads CSV, TSV, parquet and Arrow files into records: CSV line by line, the others in batches of rows."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.arrow_sizes import unpacked_sizes
from conversations.reading.data_file import LONGEST_ROW, TOO_LONG, BoundedLines, DataFile, Record, RowTooLong, Unpacked
from conversations.row import is_utf8, without_nulls

_BATCH = 16  # rows held in memory at once; each may have the maximum length
_ROWS_ALLOWED = 1_000_000  # in a parquet file of any size
_BOM = "\ufeff"
_ARROW_FILE, _ARROW_FILE_START = b"ARROW1", 8  # magic bytes of an Arrow file, and the offset of its first message
NAMELESS = "Unnamed: 0"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_DELIMITERS = ("\t", ";", "|", ",")  # recognised for the error message, whatever the file's suffix


def csv_records(file: DataFile) -> Iterator[Record]:
    """The rows of a .csv or .tsv file, with the column names of its first line; all values are strings.

    Both use CSV quoting. A field may span several lines.

    Raises:
        ToolkitError: the first line is not UTF-8, or has an empty or a repeated name.
    """
    with file.open() as content:
        text = io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(LONGEST_ROW)  # the default is 131,072
        yield from _csv_rows(str(file.path), BoundedLines(text), DELIMITERS[file.kind])


def _csv_rows(path: str, lines: BoundedLines[str], delimiter: str) -> Iterator[Record]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    too_long = 0
    while True:
        line = reader.line_num + too_long + 1
        lines.taken = 0
        try:
            fields = next(reader)
        except RowTooLong as error:
            too_long += 1  # a line that csv.reader has not counted
            yield Record(line, "", {}, str(error))
            continue
        except StopIteration:
            return
        except csv.Error as error:
            span = f"; its quotes make this row end on line {reader.line_num}" if reader.line_num > line else ""
            yield Record(line, "", {}, f"broken quotes: {error}{span}")
            continue
        if not fields:
            continue
        if not names:
            names = _checked_names(path, fields)
            continue
        text = delimiter.join(fields)
        yield Record(line, text, dict(zip(names, fields, strict=False)), _csv_problem(names, fields, text))


def _checked_names(path: str, names: list[str]) -> list[str]:
    if not is_utf8("".join(names)):
        raise ToolkitError(f"{path}:1: not valid UTF-8; save the file as UTF-8")
    if len(names) == 1 and (delimiter := _other_delimiter(names[0])):
        raise ToolkitError(
            f"{path}:1: the first line has {delimiter!r} between its columns; save the file with commas (.csv) "
            "or tabs (.tsv)"
        )
    if names[0] == "" and any(names):  # pandas writes an index so, and uses this name when it reads one
        names = [NAMELESS, *names[1:]]
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice or "" in names:
        wrong = f"names {twice[0]!r} twice" if twice and twice[0] else "has an empty name"
        raise ToolkitError(f"{path}:1: the first line {wrong}; it must name the columns")
    return names


def _other_delimiter(line: str) -> str | None:
    """The delimiter that the first line seems to use, if it was read as one name."""
    return next((mark for mark in _DELIMITERS if all(name.strip() for name in line.split(mark)) and mark in line), None)


def _csv_problem(names: list[str], fields: list[str], text: str) -> str | None:
    if len(fields) != len(names):
        return f"{len(fields)} fields, but the first line names {len(names)} columns"
    if fields[0].startswith(_BOM):
        return "a byte order mark in the middle of the file"
    return None if is_utf8(text) else "not valid UTF-8"


def parquet_records(file: DataFile) -> Iterator[Record]:
    """The rows of a .parquet file, numbered from 1.

    Raises:
        OSError: the file is not parquet, is damaged, or decompresses to more than the limit.
    """
    from pyarrow import parquet

    with file.open_seekable() as content:
        size = file.packed_size
        yield from _table_records(lambda: _parquet_batches(parquet.ParquetFile(content), size), size)


def _parquet_batches(table: Any, size: int) -> Iterator[Any]:
    """Raises OSError if the metadata says that the file decompresses to more than the limit."""
    about = table.metadata
    if about.num_rows > max(_ROWS_ALLOWED, size):
        raise OSError(f"has {about.num_rows:,} rows in {size:,} bytes, over the limit of one row per byte")
    groups = map(about.row_group, range(about.num_row_groups))
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    unpacked = Unpacked(size)
    for chunk in chunks:
        unpacked.add(chunk.total_uncompressed_size)
    # A long value in a dictionary is repeated for each row of a batch.
    dense = any(c.total_uncompressed_size > max(LONGEST_ROW, 20 * c.total_compressed_size) for c in chunks)
    return table.iter_batches(batch_size=1 if dense else _BATCH)


def arrow_records(file: DataFile) -> Iterator[Record]:
    """The rows of an .arrow file, in Arrow's file or stream format, numbered from 1.

    Raises:
        OSError: the file is not Arrow, is damaged, or decompresses to more than the limit.
    """
    from pyarrow import ipc

    with file.open_seekable() as content:
        is_file = content.read(len(_ARROW_FILE)) == _ARROW_FILE
        start = _ARROW_FILE_START if is_file else 0

        def batches() -> Iterator[Any]:
            if is_file:  # a stream followed by a footer; this checks that the footer is there
                ipc.open_file(content)
            content.seek(start)
            unpacked = Unpacked(file.packed_size)
            for size in unpacked_sizes(content):
                unpacked.add(size)
            content.seek(start)
            for batch in ipc.open_stream(content):
                for column in batch.columns:
                    _check_column(column)
                yield batch

        yield from _table_records(batches, file.packed_size)


def _check_column(column: Any) -> None:
    """Validate the offsets of strings and lists: pyarrow trusts them, and reads out of bounds in a damaged file.

    Strings that are not UTF-8 do not count as damage: their rows are refused one by one.

    Raises:
        pyarrow.ArrowException: an invalid offset.
    """
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid:
        column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: Any) -> Any:
    """The type with strings replaced by bytes, also inside lists and structs."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_list(kind):
        return pyarrow.list_(_as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pyarrow.large_list(_as_bytes(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


def _table_records(batches: Callable[[], Iterable[Any]], packed_size: int) -> Iterator[Record]:
    import pyarrow

    number, unpacked = 0, Unpacked(packed_size)
    try:
        for batch in batches():
            for start in range(0, batch.num_rows, _BATCH):
                rows_of_batch = _decoded(batch.slice(start, _BATCH))
                unpacked.add(rows_of_batch.nbytes)
                for value, problem in _table_rows(rows_of_batch):
                    number += 1
                    yield Record(number, None, value, problem)
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from error
    except UnicodeDecodeError as error:  # values were decoded row by row, so this is a column's name
        raise OSError("the name of a column is not valid UTF-8") from error


def _decoded(batch: Any) -> Any:
    """The batch with dictionary-encoded columns decoded."""
    import pyarrow

    columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _table_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The batch's rows; decoded one by one if any of them is not UTF-8 or too long."""
    if batch.nbytes <= LONGEST_ROW:
        try:
            yield from ((_row(values), None) for values in _values(batch))
            return
        except UnicodeDecodeError:
            pass
    for row in (batch.slice(index, 1) for index in range(batch.num_rows)):
        if row.nbytes > LONGEST_ROW:
            yield {}, TOO_LONG
            continue
        try:
            yield _row(_values(row)[0]), None
        except UnicodeDecodeError:
            yield {}, "not valid UTF-8"


def _values(batch: Any) -> list[dict[str, Any]]:
    return batch.to_pylist(maps_as_pydicts="lossy")


def _row(values: dict[str, Any]) -> dict[str, Any]:
    return {name: without_nulls(value) for name, value in values.items()}
