"""The kind of a data file, by its name, and its bytes, decompressed as they are read."""

import gzip
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from conversations.errors import ToolkitError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_BUFFER = 1 << 20


def _plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _gzip(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb"))


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.input_stream(str(path), compression="zstd", buffer_size=_BUFFER)
    return io.BufferedReader(stream, _BUFFER)


_COMPRESSION: dict[str, Callable[[Path], IO[bytes]]] = {"": _plain, ".gz": _gzip, ".zst": _zstd}


def file_kind(path: Path) -> str:
    """One of KINDS.

    Raises:
        ToolkitError: no such file, a directory, or a name that ends in none of them.
    """
    if path.is_dir():
        raise ToolkitError(f"{path} is a directory; name a file in it")
    if not path.exists():
        raise ToolkitError(f"{path}: no such file")
    kind, _ = _suffixes(path)
    if kind not in KINDS:
        raise ToolkitError(f"{path}: unknown kind of file; known are {', '.join(KINDS)}, also with .gz or .zst behind")
    return kind


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed on the way; it can be read once, from the start to the end."""
    return _COMPRESSION[_suffixes(path)[1]](path)


def open_seekable(path: Path) -> IO[bytes]:
    """The file's content for readers that jump about: a compressed file is unpacked to a temporary one first."""
    if not _suffixes(path)[1]:
        return _plain(path)
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with open_bytes(path) as packed:
        shutil.copyfileobj(packed, unpacked, _BUFFER)
    unpacked.seek(0)
    return cast("IO[bytes]", unpacked)


def _suffixes(path: Path) -> tuple[str, str]:
    """(kind, compression) as the name has them, in lower case: (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSION else ""
    return (suffixes[-1] if suffixes else ""), packed
