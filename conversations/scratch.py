"""Temporary files that are cleaned up even after a kill: one directory per process, locked while it runs.

The directory is removed when the process ends. After a kill, the next start finds it unlocked and removes it.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "dsv2-"
_LOCK = "lock"
_OLD = 24 * 3600  # seconds after which a directory without a lock counts as abandoned
# Directories of this process, by process id (a fork has its own) and parent directory.
_homes: dict[tuple[int, Path], tuple[Path, int]] = {}


def scratch_directory(beside: Path | None = None) -> Path:
    """A new directory for files of this process, in the temporary directory or in `beside`, next to their
    destination."""
    owner = os.getpid(), beside or Path(tempfile.gettempdir())
    if owner not in _homes:
        if not any(pid == os.getpid() for pid, _ in _homes):
            atexit.register(remove_scratch)
        _homes[owner] = _make_home(owner[1])
    return Path(tempfile.mkdtemp(dir=_homes[owner][0]))


def remove_scratch() -> None:
    """Remove this process's directories. Files that are mapped into memory stay readable."""
    for owner in [owner for owner in _homes if owner[0] == os.getpid()]:
        folder, handle = _homes.pop(owner)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned(where: Path | None = None) -> None:
    """Remove the directories of this user's killed processes."""
    if where is None:
        try:
            where = Path(tempfile.gettempdir())
        except FileNotFoundError:  # none can be written: a full or read-only disk
            return
    for folder in where.glob(f"{PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            if folder.is_dir() and about.st_uid == os.getuid() and _is_abandoned(folder, about.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _make_home(where: Path) -> tuple[Path, int]:
    """The process's directory and its lock's file descriptor. It gets its final name only once it is locked."""
    home = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=where))
    handle = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    return home.rename(home.with_name(home.name.removeprefix("."))), handle


def _is_abandoned(folder: Path, changed: float) -> bool:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return time.time() - changed > _OLD
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
