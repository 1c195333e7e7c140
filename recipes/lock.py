"""One process at a time writes to a place: a lock file that says who does.

The kernel keeps the lock (flock) and gives it up when its owner ends, however it ends, so that what a killed process
leaves behind is taken over. A lock file that was written on another host is not: flock need not reach that far. It has
to be removed by hand, and the message says which file.
"""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from recipes.processes import command_line, is_main, now

LOCK = ".lock"
ROOM = 64 << 10  # bytes; enough for a manifest
_SHOWN = 500  # characters of each thing that a lock says
_TRIES, _PAUSE = 5, 0.1  # `dsv2 report` looks at a lock by taking it for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems without them


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as its file says. Empty and 0 where it does not."""

    host: str = ""
    pid: int = 0
    command: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})" if self.pid else "a process"


class Lock:
    """A lock that is held. `handle` is that of its file; None for the other processes of a launch."""

    def __init__(self, handle: int | None = None):
        self._handle = handle

    def make_room(self) -> None:
        """Give up the room that the lock file keeps, so that a full disk takes the last words of a run."""
        if self._handle is not None:
            with suppress(OSError):
                os.ftruncate(self._handle, len(os.pread(self._handle, ROOM, 0).rstrip()))


@contextmanager
def hold_directory(folder: Path) -> Iterator[Lock]:
    """Be the only one to write into a run directory, which is made when missing and goes again when it stays empty.

    The processes of one launch are one owner. Files that a killed owner had half written are removed.

    Raises:
        ToolkitError: somebody else holds it, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ToolkitError(f"output_dir {folder} is a file; choose another output_dir")
    with _hold(folder / LOCK, folder, ROOM) as lock:
        if is_main():
            for half in folder.glob(".*.tmp"):
                with suppress(OSError):
                    half.unlink()
        yield lock


@contextmanager
def hold_path(target: Path) -> Iterator[Lock]:
    """Be the only one to write a file or directory that appears at once, when it is whole. Raises as above."""
    target = target.absolute()
    with _hold(target.with_name(f".{target.name}.lock"), target, 0) as lock:
        yield lock


def owner_of(folder: Path) -> Owner | None:
    """Who works in a run directory now; None where nobody does. On another host that cannot be known: its owner is
    taken to be alive."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)  # whatever it is: a pipe would wait for a writer
    except OSError:
        return None
    try:
        owner = _read(handle)
        free = _lock(handle, fcntl.LOCK_SH, owner)
        return None if free and owner.host in ("", platform.node()) else owner
    finally:
        os.close(handle)


@contextmanager
def _hold(file: Path, place: Path, room: int) -> Iterator[Lock]:
    if not is_main():
        yield Lock()
        return
    new_folders = [folder for folder in (file.parent, *file.parent.parents) if not folder.exists()]
    try:
        handle = _take(file, place)
        try:
            _write(handle, room)
        except OSError:
            _release(file, handle)
            raise
    except OSError as error:
        _remove_empty(new_folders)
        raise ToolkitError(
            f"{place} cannot be written: {error.strerror or error}; free some space, or choose another directory"
        ) from error
    pid = os.getpid()
    try:
        yield Lock(handle)
    finally:
        if os.getpid() == pid:  # and no child of this process
            _release(file, handle)
            _remove_empty(new_folders)


def _take(file: Path, place: Path) -> int:
    """Open and lock the file. Raises ToolkitError when somebody else has it."""
    owner = Owner()
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ToolkitError(f"{file} is not a regular file, as locks are; remove it, or choose another directory")
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        owner = _read(handle)
        if _lock(handle, fcntl.LOCK_EX, owner):
            if owner.host not in ("", platform.node()):
                os.close(handle)
                raise ToolkitError(
                    f"{place} is in use by {owner}, which cannot be checked from here; if it has ended, remove {file}"
                )
            with suppress(FileNotFoundError):  # its last owner has removed it, and it must be made again
                if os.stat(file).st_ino == os.fstat(handle).st_ino:
                    return handle
        os.close(handle)
        time.sleep(_PAUSE)
    raise ToolkitError(f"{place} is in use by {owner}; wait for it to finish, stop it, or choose another directory")


def _lock(handle: int, kind: int, owner: Owner) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _is_alive(owner)


def _is_alive(owner: Owner) -> bool:
    """Where the file system has no locks: is there a process of that number on this host?"""
    if owner.pid <= 0:
        return False
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return owner.pid != os.getpid()


def _read(handle: int) -> Owner:
    try:
        said = json.loads(os.pread(handle, ROOM, 0))
        host, command, since = (_one_line(said[key]) for key in ("host", "command", "since"))
        return Owner(host, int(said["pid"]), command, since)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError):
        return Owner()


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())[:_SHOWN]


def _write(handle: int, room: int) -> None:
    said = {"host": platform.node(), "pid": os.getpid(), "command": command_line(), "since": now()}
    text = json.dumps(said).encode().ljust(room)
    os.ftruncate(handle, 0)
    written = 0
    while written < len(text):
        written += os.pwrite(handle, text[written:], written)


def _release(file: Path, handle: int) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)
    os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that nothing was put into, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
