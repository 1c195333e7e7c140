"""The `split` of a data entry, which selects rows of a source."""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from conversations.errors import ToolkitError
from conversations.row import Row

_END = r"\d+(?:\.\d+)?%|\d+|"
_SPLIT = re.compile(rf"(?P<name>[\w.-]*)(?:\[(?P<start>{_END}):(?P<end>{_END})\])?")


@dataclass(frozen=True)
class Split:
    """name: the data set's split, or "". rows: range of row numbers (first, end); or shares: range (from, to) in [0, 1]
    of the hash of the first question."""

    name: str = ""
    rows: tuple[int, int | None] | None = None
    shares: tuple[float, float] | None = None

    def meets(self, other: "Split") -> bool:
        """Whether both may contain the same row of a file."""
        if self.rows is not None and other.rows is not None:
            ends = [math.inf if split.rows[1] is None else split.rows[1] for split in (self, other) if split.rows]
            return max(self.rows[0], other.rows[0]) < min(ends)
        if self.shares is not None and other.shares is not None:
            return max(self.shares[0], other.shares[0]) < min(self.shares[1], other.shares[1])
        return True

    def select(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows of this split, reading lazily."""
        if self.rows is not None:
            return islice(rows, *self.rows)
        if self.shares is None:
            return rows
        low, high = self.shares
        return (row for row in rows if low <= place(row) < high)


def parse_split(text: str | None, key: str) -> Split:
    """`NAME`, `NAME[10:20]` or `NAME[10%:20%]`; the name may be left out.

    Raises:
        ToolkitError: the text has another form, or selects no rows.
    """
    match = _SPLIT.fullmatch(text or "")
    if match is None:
        raise ToolkitError(f"{key}: {text!r} is not NAME, NAME[:100] or NAME[:90%]")
    start, end = match["start"], match["end"]
    if start is None:
        return Split(match["name"])
    percent = [value for value in (start, end) if value.endswith("%")]
    if percent and any(value not in ("", *percent) for value in (start, end)):
        raise ToolkitError(f"{key}: {text!r} mixes rows and percent; write NAME[:100] or NAME[:90%]")
    if percent:
        shares = float(start.rstrip("%") or 0) / 100, float(end.rstrip("%") or 100) / 100
        if not 0 <= shares[0] < shares[1] <= 1:
            raise ToolkitError(f"{key}: {text!r} selects nothing; the first share must be below the second, to 100 %")
        return Split(match["name"], shares=shares)
    rows = int(start or 0), int(end) if end else None
    if rows[1] is not None and rows[0] >= rows[1]:
        raise ToolkitError(f"{key}: {text!r} selects nothing; the first number must be below the second")
    return Split(match["name"], rows=rows)


def place(row: Row) -> float:
    """A number in [0, 1) that depends only on how a conversation begins.

    So rows with the same first question (turns of a conversation, answers to a prompt, duplicates) always fall into
    the same split, and splits do not depend on the recipe, its seed, or the file's order.
    """
    digest = hashlib.sha256(_opening(row).encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _opening(row: Row) -> str:
    if "text" in row:
        return row["text"]
    messages = row.get("messages") or row["prompt"]
    return next((message["content"] for message in messages if message["role"] == "user"), "")
