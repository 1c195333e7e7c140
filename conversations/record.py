"""What every reader of files gives: a record, where it stands, and what is wrong with it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """One row of a file as an object.

    line: where it begins, from 1; the row's number in a parquet file. value: the object, where problem is None.
    text: as written, for those who mend it; None where the file holds no text of its own (parquet). place: what comes
    before a reason where the line says too little ("element 17: ", of an array on one line).
    """

    line: int
    text: str | None
    value: dict[str, Any]
    problem: str | None = None
    place: str = ""


def is_utf8(text: str) -> bool:
    """Whether text that was decoded with "surrogateescape" was UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
