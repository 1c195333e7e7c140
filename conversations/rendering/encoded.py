"""Encoded rows on disk: an Arrow file of token ids, and the length report."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import pyarrow
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from conversations.errors import ToolkitError
from conversations.progress import bar
from conversations.rendering.encoding import tokenizer_identity
from conversations.rendering.lengths import LengthReport
from conversations.row import Row
from conversations.row_cache import CacheEntry, RowCache
from conversations.scratch import scratch_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = "rows.arrow"
Columns = dict[str, Any]  # of a batch of rows: name -> Arrow column or list
# (the report that counts the rows) -> the columns, batch by batch.
Encoded = Callable[[LengthReport], Iterable[Columns]]


class EncodedRows(NamedTuple):
    """Rows as token ids, their length report, and their cache entry."""

    data: Dataset
    report: LengthReport
    entry: CacheEntry


def encoded_dataset(
    cache: RowCache, key: Any, features: Features, encoded: Encoded, *, rows: int | None, max_length: int | None
) -> EncodedRows:
    """The columns that `encoded` yields, as a memory-mapped data set; from the cache if present.

    Args:
        key: everything the rows depend on, as JSON; None if that is unknown (then nothing is cached).
        rows: their number, for the progress bar; None if unknown.
        max_length: for the error message.

    Raises:
        ToolkitError: no row is left, or one cannot be encoded.
    """

    def make(folder: Path) -> None:
        report, rows_written, rows_counted = LengthReport(), 0, 0
        with (
            ArrowWriter(path=str(folder / _ROWS), features=features) as writer,
            bar("encoding", rows, "rows", cache.shows) as advance,
            _rare_collections(),
        ):
            for columns in encoded(report):
                table = pyarrow.table(columns)
                if len(table):
                    writer.write_table(table)
                rows_written += len(table)
                advance(report.rows - rows_counted)
                rows_counted = report.rows
            writer.finalize()
        if not rows_written:
            raise ToolkitError(report.nothing_left(max_length))
        report.write(folder)

    entry = cache.entry("tokens", key, make)
    return EncodedRows(Dataset.from_file(str(_readable(entry.folder))), LengthReport.read(entry.folder), entry)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Runs Python's garbage collector less often: with many long-lived lists and no cycles it takes a quarter of the
    time."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _readable(folder: Path) -> Path:
    """The Arrow file, or a link to it if its folder is read-only: datasets derived from it (TRL's packing) are cached
    beside it."""
    if os.access(folder, os.W_OK):
        return folder / _ROWS
    link = scratch_directory() / _ROWS
    link.symlink_to(folder.absolute() / _ROWS)
    return link


def key_of(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", **settings: Any) -> dict[str, Any] | None:
    """The cache key of encoded rows; None if the rows or the tokenizer cannot be identified."""
    identity = getattr(rows, "identity", None)
    if identity is None or (by := tokenizer_identity(tokenizer)) is None:
        return None
    return {"rows": identity, "tokenizer": by, **settings}


def id_lists(lists: Sequence[Sequence[int]]) -> pyarrow.Array:
    """Lists of token ids as a column."""
    return _column(_flat(lists), lists)


def labelled(ids: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], ignored: int) -> Columns:
    """The columns input_ids and labels; labels are the ids where the mask is 1, otherwise `ignored`."""
    flat = _flat(ids)
    labels = numpy.where(_flat(masks) == 1, flat, numpy.int32(ignored))
    return {"input_ids": _column(flat, ids), "labels": _column(labels, ids)}


def _flat(lists: Iterable[Iterable[int]]) -> numpy.ndarray:
    return numpy.fromiter(chain.from_iterable(lists), dtype=numpy.int32)


def _column(flat: numpy.ndarray, lists: Sequence[Sequence[int]]) -> pyarrow.Array:
    ends = numpy.cumsum([0, *map(len, lists)], dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(ends), pyarrow.array(flat))


def lengths_of(data: Dataset, column: str = "input_ids") -> numpy.ndarray:
    """The number of tokens of each row."""
    chunks = data.data.column(column).chunks
    return numpy.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks])
