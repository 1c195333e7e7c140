"""An on-disk cache of prepared rows, keyed by a hash of everything they depend on; entries are written atomically."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.scratch import remove_abandoned, scratch_directory
from conversations.tally import counted

CONTENTS = "contents.json"
Make = Callable[[Path], None]  # writes an entry's files into the directory


@dataclass(frozen=True)
class CacheEntry:
    """A directory of prepared data.

    hit: it existed already; otherwise creating it took `seconds`. stored: it outlives the process. why_not: why it was
    not stored although it should have been.
    """

    folder: Path
    hit: bool
    stored: bool
    seconds: float = 0.0
    why_not: str = ""

    def line(self, verb: str, rows: int) -> str:
        """For the user: "encoded 100,000 rows in 20.1 s (4,975 rows/s); cached in runs/prepared/tokens-5f"."""
        if self.hit:
            return f"{counted(rows)} {verb} earlier, reused from {self.folder} ({self._size()})"
        speed = f"{verb} {counted(rows)} in {self.seconds:.1f} s ({rows / max(self.seconds, 1e-3):,.0f} rows/s)"
        end = f"; cached in {self.folder} ({self._size()})" if self.stored else ""
        return f"{speed}{end}{f'; not cached: {self.why_not}' if self.why_not else ''}"

    def _size(self) -> str:
        return f"{sum(file.stat().st_size for file in self.folder.iterdir()) / 1e6:,.1f} MB"


@dataclass(frozen=True)
class RowCache:
    """Where prepared data is cached.

    folder: holds one directory per entry; None stores nothing. version: identifies the code and libraries, on which
    every entry depends. first: lets the main process create what the other processes then reuse. shows: whether this
    process draws progress bars.
    """

    folder: Path | None = None
    version: str = ""
    first: Callable[[Callable[[], CacheEntry]], CacheEntry] = lambda do: do()
    shows: bool = True

    def has(self, kind: str, key: Any) -> bool:
        """Whether the entry for `key` is in the cache."""
        return self.folder is not None and key is not None and _is_whole(self._place(kind, key)[0])

    def _place(self, kind: str, key: Any) -> tuple[Path, dict[str, Any]]:
        """The directory of an entry, and what its name stands for."""
        assert self.folder is not None
        contents = {"kind": kind, "version": self.version, "key": key}
        digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{kind}-{digest[:24]}", contents

    def entry(self, kind: str, key: Any, make: Make) -> CacheEntry:
        """The directory of the entry for `key` (JSON); calls `make` if it is not in the cache.

        Only a complete entry gets its final name; without a folder or a key (None) it is a temporary directory. Raises
        whatever `make` raises, and then stores nothing.
        """
        if self.folder is None or key is None:
            return _temporary(make)
        path, contents = self._place(kind, key)
        return self.first(
            lambda: CacheEntry(path, True, True) if _is_whole(path) else self._create(path, contents, make)
        )

    def _create(self, path: Path, contents: dict[str, Any], make: Make) -> CacheEntry:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(path.parent)
            unfinished = scratch_directory(path.parent) / path.name
            unfinished.mkdir()  # with the mode of the umask, unlike a directory of tempfile's
        except OSError as error:
            return _temporary(make, f"{path.parent}: {error.strerror}")
        began = time.monotonic()
        try:
            make(unfinished)
            sizes = {file.name: file.stat().st_size for file in unfinished.iterdir()}
            (unfinished / CONTENTS).write_text(
                json.dumps({**contents, "files": sizes}, indent=1) + "\n", encoding="utf-8"
            )
            _publish(unfinished, path)
        finally:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
        return CacheEntry(path, False, True, time.monotonic() - began)


def _publish(unfinished: Path, path: Path) -> None:
    """Move an entry to its final name; one that another process has stored there in the meantime is equivalent."""
    if path.exists() and not _is_whole(path):
        shutil.rmtree(path)
    try:
        unfinished.rename(path)
    except OSError:
        if not _is_whole(path):
            raise


def _is_whole(path: Path) -> bool:
    """Whether all files exist with their recorded sizes; a file system crash may have truncated one."""
    try:
        sizes = json.loads((path / CONTENTS).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _temporary(make: Make, why_not: str = "") -> CacheEntry:
    began, folder = time.monotonic(), scratch_directory()
    make(folder)
    return CacheEntry(folder, False, False, time.monotonic() - began, why_not)
