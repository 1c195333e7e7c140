"""The kind of a data file, by its name, and its bytes, decompressed as they are read."""

import gzip
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from conversations.errors import ToolkitError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
LONGEST_ROW = 16 << 20  # bytes or characters; the longest context of a model is a hundredth of it
TOO_LONG = f"longer than {LONGEST_ROW:,} bytes or characters, the most that a row may have"
_BUFFER = 1 << 20
Text = TypeVar("Text", bytes, str)


class RowTooLong(Exception):
    """A line or row is longer than LONGEST_ROW."""


DataFile = Path | zipfile.Path  # a file, or a member of a .zip


def _plain(path: DataFile) -> IO[bytes]:
    return cast("IO[bytes]", path.open("rb"))


def _gzip(path: DataFile) -> IO[bytes]:
    file = gzip.GzipFile(fileobj=_plain(path))
    file.myfileobj = cast(Any, file.fileobj)  # so that it is closed with it
    return cast("IO[bytes]", file)


def _zstd(path: DataFile) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.input_stream(pyarrow.PythonFile(_plain(path)), compression="zstd", buffer_size=_BUFFER)
    return io.BufferedReader(stream, _BUFFER)


_COMPRESSION: dict[str, Callable[[DataFile], IO[bytes]]] = {"": _plain, ".gz": _gzip, ".zst": _zstd}


def has_known_kind(path: Path) -> bool:
    """Whether a name ends as that of a data file does."""
    return _suffixes(path)[0] in KINDS


def file_kind(path: DataFile) -> str:
    """One of KINDS.

    Raises:
        ToolkitError: no such file, or a name that ends in none of them.
    """
    if not path.exists():
        raise ToolkitError(f"{path}: no such file")
    kind, _ = _suffixes(path)
    if kind not in KINDS:
        raise ToolkitError(
            f"{path}: unknown kind of file; known are {', '.join(KINDS)}, also with .gz or .zst behind, and .zip"
        )
    return kind


def open_bytes(path: DataFile) -> IO[bytes]:
    """The file's content, decompressed on the way; it can be read once, from the start to the end."""
    return _COMPRESSION[_suffixes(path)[1]](path)


def open_seekable(path: DataFile) -> IO[bytes]:
    """The file's content for readers that jump about: a compressed file is unpacked to a temporary one first."""
    if not _suffixes(path)[1] and isinstance(path, Path):
        return _plain(path)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with open_bytes(path) as packed:
        shutil.copyfileobj(packed, unpacked, _BUFFER)
    unpacked.seek(0)
    return cast("IO[bytes]", unpacked)


class BoundedLines(Generic[Text]):
    """The lines of a file, none of them longer than a row may be, so that memory does not grow with a line.

    `taken` counts what has been read since it was last set to 0: a row of CSV may go over several lines.
    """

    def __init__(self, file: IO[Text]):
        self._file = file
        self.taken = 0

    def __iter__(self) -> "BoundedLines[Text]":
        return self

    def __next__(self) -> Text:
        """The next line. Raises RowTooLong once it has passed over one that is too long."""
        line = self._file.readline(LONGEST_ROW + 1)
        self.taken += len(line)
        if self.taken > LONGEST_ROW:
            self._pass_over(line)
            raise RowTooLong(TOO_LONG)
        if not line:
            raise StopIteration
        return line

    def _pass_over(self, line: Text) -> None:
        while line and line[-1:] not in (b"\n", "\n"):
            line = self._file.readline(_BUFFER)


def _suffixes(path: DataFile) -> tuple[str, str]:
    """(kind, compression) as the name has them, in lower case: (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSION else ""
    return (suffixes[-1] if suffixes else ""), packed
