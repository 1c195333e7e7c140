"""Stores the rows of a mixture in a file: in memory each row takes only eight bytes."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

import numpy

from conversations.row import Row

_ROWS, _ENDS = "rows.jsonl", "ends.npy"
_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)


class RowWriter:
    """Context manager that writes rows to a directory for `RowStore`; the files are complete when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _ROWS).open("wb")
        self._ends = array("Q", [0])

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            numpy.save(self._folder / _ENDS, numpy.asarray(self._ends))

    def append(self, row: Row) -> None:
        size = self._file.write(_ENCODER.encode(row).encode("utf-8", errors="surrogatepass") + b"\n")
        self._ends.append(self._ends[-1] + size)

    def __len__(self) -> int:
        return len(self._ends) - 1


class RowStore:
    """Random access to the rows in a directory written by `RowWriter`."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / _ROWS).open("rb")
        self._ends = numpy.load(folder / _ENDS, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def nbytes(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Row:
        start, end = int(self._ends[index]), int(self._ends[index + 1])
        self._file.seek(start)
        return json.loads(self._file.read(end - start))


class MixedRows(Sequence[Row]):
    """Rows of a store in a given order, possibly repeated.

    order: row numbers in the store. starts: number of each source's first row in the store. name: identifies the
    store's contents; None if unnamed.
    """

    def __init__(self, store: RowStore, order: array, starts: Sequence[int], name: str | None = None):
        self._store = store
        self._order = order
        self._starts = list(starts)
        self._name = name

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._store.read(number) for number in self._order[index]]
        return self._store.read(self._order[index])

    def __iter__(self) -> Iterator[Row]:
        return (self._store.read(number) for number in self._order)

    def source_of(self, index: int) -> int:
        """The number of the source that the row at `index` comes from."""
        return bisect_right(self._starts, self._order[index]) - 1

    def of_source(self, source: int) -> "MixedRows":
        """The rows of one source, in the same order."""
        order = array("Q", (number for i, number in enumerate(self._order) if self.source_of(i) == source))
        return MixedRows(self._store, order, self._starts, self._name)

    @property
    def identity(self) -> str | None:
        """Identifies the rows and their order; None if the store is unnamed."""
        return None if self._name is None else f"{self._name}/{hashlib.sha256(self._order.tobytes()).hexdigest()}"

    @property
    def mean_bytes(self) -> float:
        """Approximate mean size of a row, in bytes of JSON."""
        return self._store.nbytes / max(1, len(self._store))
