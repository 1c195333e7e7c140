"""What every reader of files gives: a record, where it stands, and what is wrong with it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One row of a file as an object.

    line: where it begins, from 1; the row's number in a parquet file. value: the object, where problem is None.
    text: as written, for those who mend it; None where the file holds no text of its own (parquet). place: what comes
    before a reason where the line says too little ("element 17: ", of an array on one line). beside: no row, but keys
    that stand beside a list of rows.
    """

    line: int
    text: str | None
    value: dict[str, Any]
    problem: str | None = None
    place: str = ""
    beside: tuple[str, ...] = ()


def is_utf8(text: str) -> bool:
    """Whether text that was decoded with "surrogateescape" was UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def without_padding(value: Any) -> Any:
    """A value of a table without the keys that are null in its objects.

    In a table all objects of a column have the same keys: those that a row does not have are there as null. A null that
    a file had before it became a table cannot be told from these.
    """
    if isinstance(value, dict):
        return {key: without_padding(item) for key, item in value.items() if item is not None}
    return [without_padding(item) for item in value] if isinstance(value, list) else value
