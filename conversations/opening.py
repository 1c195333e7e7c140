"""The kind of a data file, by its name, and its bytes, decompressed as they are read."""

import gzip
import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from conversations.errors import ToolkitError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_BUFFER = 1 << 20


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


def _suffixes(path: DataFile) -> tuple[str, str]:
    """(kind, compression) as the name has them, in lower case: (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSION else ""
    return (suffixes[-1] if suffixes else ""), packed
