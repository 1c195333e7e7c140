"""Prepared data kept on disk, by the hash of all that it was made from: whole under its name, or not there."""

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
Make = Callable[[Path], None]  # writes into the directory


@dataclass(frozen=True)
class Place:
    """A directory of prepared data.

    found: it was made before; otherwise making it took `seconds`. kept: it stays when the process ends; otherwise
    `why`, where it should have stayed.
    """

    folder: Path
    found: bool
    kept: bool
    seconds: float = 0.0
    why: str = ""

    def line(self, what: str, rows: int) -> str:
        """For the user: "encoded 100,000 rows in 20.1 s (4,975 rows/s); kept in runs/prepared/tokens-5f"."""
        if self.found:
            return f"{counted(rows)} {what} before, found in {self.folder} ({self._size()})"
        speed = f"{what} {counted(rows)} in {self.seconds:.1f} s ({rows / max(self.seconds, 1e-3):,.0f} rows/s)"
        end = f"; kept in {self.folder} ({self._size()})" if self.kept else ""
        return f"{speed}{end}{f'; not kept: {self.why}' if self.why else ''}"

    def _size(self) -> str:
        return f"{sum(file.stat().st_size for file in self.folder.iterdir()) / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Kept:
    """Where prepared data is kept.

    folder: holds a directory for each thing that was prepared; None keeps nothing. version: what all of it depends on:
    code and libraries. first: lets the main of several processes make what the others find. shows: whether this
    process draws bars.
    """

    folder: Path | None = None
    version: str = ""
    first: Callable[[Callable[[], Place]], Place] = lambda do: do()
    shows: bool = True

    def place(self, kind: str, key: Any, make: Make) -> Place:
        """The directory of what was made from `key` (JSON), made now where it is not there.

        Only what is whole gets its name; without a folder, or a key (None), it lies in a temporary directory. Raises
        what `make` raises, and keeps nothing then.
        """
        if self.folder is None or key is None:
            return _unkept(make)
        about = {"kind": kind, "version": self.version, "key": key}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        place = self.folder / f"{kind}-{digest[:24]}"
        return self.first(lambda: Place(place, True, True) if _is_whole(place) else self._made(place, about, make))

    def _made(self, place: Path, about: dict[str, Any], make: Make) -> Place:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(place.parent)
            made = scratch_directory(place.parent) / place.name
            made.mkdir()  # with the mode that the umask says, unlike a directory of tempfile's
        except OSError as error:
            return _unkept(make, f"{place.parent}: {error.strerror}")
        began = time.monotonic()
        try:
            make(made)
            sizes = {file.name: file.stat().st_size for file in made.iterdir()}
            (made / CONTENTS).write_text(json.dumps({**about, "files": sizes}, indent=1) + "\n", encoding="utf-8")
            _put(made, place)
        finally:
            shutil.rmtree(made.parent, ignore_errors=True)
        return Place(place, False, True, time.monotonic() - began)


def _put(made: Path, place: Path) -> None:
    """Give it its name; what another process has put there meanwhile is as good."""
    if place.exists() and not _is_whole(place):
        shutil.rmtree(place)
    try:
        made.rename(place)
    except OSError:
        if not _is_whole(place):
            raise


def _is_whole(place: Path) -> bool:
    """Whether all files are there with their sizes; a file system that broke off may have kept less."""
    try:
        sizes = json.loads((place / CONTENTS).read_text(encoding="utf-8"))["files"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _unkept(make: Make, why: str = "") -> Place:
    began, folder = time.monotonic(), scratch_directory()
    make(folder)
    return Place(folder, False, False, time.monotonic() - began, why)
