"""Shared by all file readers: a data file, its bytes (decompressed on the fly) and lines, and its records."""

import gzip
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from conversations.errors import ToolkitError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
LONGEST_ROW = 16 << 20  # bytes or characters; a model's longest context is a hundredth of it
TOO_LONG = f"longer than {LONGEST_ROW:,} bytes or characters, the limit for a row"
_BUFFER = 1 << 20
# Limit on what a compressed file may decompress to: a multiple of its size, or a number of bytes if that is more. Text
# compresses to a third or a tenth of its size; a few kilobytes that decompress endlessly are an attack on disk or
# memory.
LARGEST_RATIO, ALWAYS_ALLOWED = 200, 64 << 20
Text = TypeVar("Text", bytes, str)


class RowTooLong(Exception):
    """A line or row is longer than LONGEST_ROW."""


class Unpacked:
    """Counts the bytes that a compressed file decompresses to."""

    def __init__(self, packed_size: int):
        self._most = max(ALWAYS_ALLOWED, LARGEST_RATIO * packed_size)
        self._bytes = 0

    def add(self, count: int) -> None:
        """Raises OSError above the limit."""
        self._bytes += count
        if self._bytes > self._most:
            raise OSError(
                f"decompresses to more than {self._most:,} bytes, {LARGEST_RATIO} times its size or "
                f"{ALWAYS_ALLOWED:,}, the limit; decompress it yourself if this is intended"
            )


class _Bounded(io.RawIOBase):
    """A decompressed stream that raises OSError when it exceeds the limit."""

    def __init__(self, stream: IO[bytes], packed_size: int):
        self._stream = stream
        self._unpacked = Unpacked(packed_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._unpacked.add(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


@dataclass(frozen=True)
class Record:
    """One row of a file as an object.

    line: where it begins, from 1; in a parquet file the row's number. value: the object, if problem is None. text: the
    row as written, for whoever fixes it; None if the file is not text (parquet). place: a prefix for the reason if the
    line is not precise enough ("element 17: " of an array on one line). beside: the keys beside a list of rows; the
    record is then not a row.
    """

    line: int
    text: str | None
    value: dict[str, Any]
    problem: str | None = None
    place: str = ""
    beside: tuple[str, ...] = ()


def _plain(path: Path | zipfile.Path) -> IO[bytes]:
    return cast("IO[bytes]", path.open("rb"))


def _gzip(path: Path | zipfile.Path) -> IO[bytes]:
    file = gzip.GzipFile(fileobj=_plain(path))
    file.myfileobj = cast(Any, file.fileobj)  # closed together with it
    return cast("IO[bytes]", file)


def _zstd(path: Path | zipfile.Path) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.input_stream(pyarrow.PythonFile(_plain(path)), compression="zstd", buffer_size=_BUFFER)
    return stream


_COMPRESSIONS: dict[str, Callable[[Path | zipfile.Path], IO[bytes]]] = {"": _plain, ".gz": _gzip, ".zst": _zstd}


@dataclass(frozen=True)
class DataFile:
    """A file of rows. path: on disk, or of a member of a .zip. kind: one of KINDS. compression: "", ".gz" or ".zst"."""

    path: Path | zipfile.Path
    kind: str
    compression: str

    def open(self) -> IO[bytes]:
        """The content, decompressed on the fly; it can be read once, from start to end.

        Raises:
            OSError: while reading, if it decompresses to more than the limit.
        """
        stream = _COMPRESSIONS[self.compression](self.path)
        if not self.compression and isinstance(self.path, Path):
            return stream
        return cast("IO[bytes]", io.BufferedReader(_Bounded(stream, self.packed_size), _BUFFER))

    @property
    def packed_size(self) -> int:
        """Its size in bytes on disk, or in its .zip."""
        if isinstance(self.path, Path):
            return self.path.stat().st_size
        return self.path.root.getinfo(self.path.at).compress_size

    def open_seekable(self) -> IO[bytes]:
        """The content for readers that seek: a compressed file is first decompressed to a temporary one."""
        if not self.compression and isinstance(self.path, Path):
            return _plain(self.path)
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        with self.open() as packed:
            shutil.copyfileobj(packed, unpacked, _BUFFER)
        unpacked.seek(0)
        return cast("IO[bytes]", unpacked)


def has_known_kind(path: Path) -> bool:
    """Whether the file name has a known data suffix."""
    return _suffixes(path)[0] in KINDS


def data_file(path: Path | zipfile.Path) -> DataFile:
    """The data file at a path; its kind follows from its name.

    Raises:
        ToolkitError: there is no such file, or its name does not end in one of KINDS.
    """
    if not path.exists():
        raise ToolkitError(f"{path}: no such file")
    kind, compression = _suffixes(path)
    if kind not in KINDS:
        raise ToolkitError(
            f"{path}: unsupported file type; supported types are {', '.join(KINDS)}, each also as .gz or .zst, and .zip"
        )
    return DataFile(path, kind, compression)


def _suffixes(path: Path | zipfile.Path) -> tuple[str, str]:
    """(kind, compression) from the name, in lower case: (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


class BoundedLines(Generic[Text]):
    """The lines of a file, none longer than a row may be, so that memory does not grow with a line.

    `taken` counts what was read since it was last set to 0: a CSV row may span several lines.
    """

    def __init__(self, file: IO[Text]):
        self._file = file
        self.taken = 0

    def __iter__(self) -> "BoundedLines[Text]":
        return self

    def __next__(self) -> Text:
        """The next line. Raises RowTooLong once it has skipped one that is too long."""
        line = self._file.readline(LONGEST_ROW + 1)
        self.taken += len(line)
        if self.taken > LONGEST_ROW:
            while line and line[-1:] not in (b"\n", "\n"):
                line = self._file.readline(_BUFFER)
            raise RowTooLong(TOO_LONG)
        if not line:
            raise StopIteration
        return line
