"""Rows of a mixture, in a temporary file where they are many: memory does not grow with them."""

import json
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import overload

from conversations.row import Row

_IN_MEMORY = 32 << 20  # bytes; more goes to the temporary directory


class RowStore:
    """Rows that are appended once, source after source, and read in any order."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 (lives as long as this)
        self._ends = array("Q", [0])

    def append(self, row: Row) -> None:
        text = json.dumps(row, ensure_ascii=False, default=str)
        written = text.encode("utf-8", errors="surrogatepass")
        self._file.seek(self._ends[-1])
        self._file.write(written)
        self._ends.append(self._ends[-1] + len(written))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def nbytes(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Row:
        self._file.seek(self._ends[index])
        return json.loads(self._file.read(self._ends[index + 1] - self._ends[index]))


class MixedRows(Sequence[Row]):
    """Rows of a store in an order of their own, some of them more than once.

    order: numbers of rows in the store. starts: the number of each source's first row there.
    """

    def __init__(self, store: RowStore, order: array, starts: Sequence[int]):
        self._store = store
        self._order = order
        self._starts = list(starts)

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
        return MixedRows(self._store, order, self._starts)

    @property
    def mean_bytes(self) -> float:
        """Bytes of JSON a row, about."""
        return self._store.nbytes / max(1, len(self._store))
