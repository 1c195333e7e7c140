"""Temporary files that a killed process does not leave for good: one directory per process, which it keeps locked.

The directory goes when the process ends. After a kill the next start finds it unlocked and removes it.
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
_OLD = 24 * 3600  # seconds, after which a directory without a lock is nobody's
_homes: dict[int, tuple[Path, int]] = {}  # of this process, by its number: a fork has one of its own


def scratch_directory() -> Path:
    """A new directory for files of this process."""
    pid = os.getpid()
    if pid not in _homes:
        _homes[pid] = _make_home()
        atexit.register(remove_scratch)
    return Path(tempfile.mkdtemp(dir=_homes[pid][0]))


def remove_scratch() -> None:
    """Remove this process's directories. What is mapped into memory stays readable."""
    folder, handle = _homes.pop(os.getpid(), (None, -1))
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def remove_abandoned() -> None:
    """Remove the directories of this user's processes that have been killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            if folder.is_dir() and about.st_uid == os.getuid() and _is_abandoned(folder, about.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _make_home() -> tuple[Path, int]:
    """The process's directory and the handle of its lock. It gets its name when it is locked, not before."""
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    handle = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX)
    return made.rename(made.with_name(made.name.removeprefix("."))), handle


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
