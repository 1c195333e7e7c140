"""Lock files: one process at a time writes to a directory or file, and the lock names its owner.

The kernel holds the lock (flock) and releases it when the owner exits for any reason, so a lock file left by a killed
process is taken over. A lock file written on another host is not, because flock may not work across hosts: it has to
be removed by hand, and the message names the file.
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
from recipes.disk import remedy
from recipes.processes import command_line, is_main, now

LOCK = ".lock"
ROOM = 64 << 10  # bytes reserved; enough for a manifest
_SHOWN = 500  # characters of each field of a lock
_TRIES, _PAUSE = 5, 0.1  # `dsv2 report` looks at a lock by taking it for a moment
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # file systems without them


@dataclass(frozen=True)
class Owner:
    """The holder of a lock, as recorded in its file; missing fields are empty or 0."""

    host: str = ""
    pid: int = 0
    command: str = ""
    since: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.command}, since {self.since})" if self.pid else "a process"


class Lock:
    """A lock that is held. `handle` is its file descriptor; None in the other processes of a launch."""

    def __init__(self, handle: int | None = None):
        self._handle = handle

    def make_room(self) -> None:
        """Free the space reserved by the lock file, so that a run can write its final manifest to a full disk."""
        if self._handle is not None:
            with suppress(OSError):
                os.ftruncate(self._handle, len(os.pread(self._handle, ROOM, 0).rstrip()))


@contextmanager
def hold_directory(folder: Path) -> Iterator[Lock]:
    """Lock a run directory for writing. It is created if missing, and removed again if it stays empty.

    The processes of one launch share the lock. Partial files left by a killed owner are removed.

    Raises:
        ToolkitError: another process holds it, or it is not writable.
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
    """Lock a file or directory that is written atomically. Raises as `hold_directory`."""
    target = target.absolute()
    with _hold(target.with_name(f".{target.name}.lock"), target, 0) as lock:
        yield lock


def owner_of(folder: Path) -> Owner | None:
    """The process working in a run directory; None if there is none. An owner on another host cannot be checked and is
    taken to be alive."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
    except OSError:
        return None
    try:
        owner = _read_owner(handle)
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
        raise ToolkitError(f"{place} cannot be written: {error.strerror or error}; {remedy(error.errno)}") from error
    pid = os.getpid()
    try:
        yield Lock(handle)
    finally:
        if os.getpid() == pid:  # and not a forked child
            _release(file, handle)
            _remove_empty(new_folders)


def _take(file: Path, place: Path) -> int:
    """Open and lock the file. Raises ToolkitError if another process holds it."""
    owner = Owner()
    for _ in range(_TRIES):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ToolkitError(f"{file} is not a regular file, as locks are; remove it, or choose another directory")
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        owner = _read_owner(handle)
        if _lock(handle, fcntl.LOCK_EX, owner):
            if owner.host not in ("", platform.node()):
                os.close(handle)
                raise ToolkitError(
                    f"{place} is in use by {owner}, which cannot be checked from here; if it has ended, remove {file}"
                )
            with suppress(FileNotFoundError):  # its previous owner removed it, so it must be created again
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
    """For file systems without locks: whether a process with that id exists on this host."""
    if owner.pid <= 0:
        return False
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return owner.pid != os.getpid()


def _read_owner(handle: int) -> Owner:
    try:
        fields = json.loads(os.pread(handle, ROOM, 0))
        host, command, since = (_one_line(fields[key]) for key in ("host", "command", "since"))
        return Owner(host, int(fields["pid"]), command, since)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError):
        return Owner()


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())[:_SHOWN]


def _write(handle: int, room: int) -> None:
    owner = {"host": platform.node(), "pid": os.getpid(), "command": command_line(), "since": now()}
    text = json.dumps(owner).encode().ljust(room)
    os.ftruncate(handle, 0)
    written = 0
    while written < len(text):
        written += os.pwrite(handle, text[written:], written)


def _release(file: Path, handle: int) -> None:
    with suppress(OSError):
        file.unlink(missing_ok=True)
    os.close(handle)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders that are still empty, innermost first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
