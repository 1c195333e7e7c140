"""Describes a full, read-only or broken disk in one line."""

import errno
import sys

_REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not writable
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR),
}
_NO_TEMPORARY = "temporary directory"  # tempfile's words; it tries TMPDIR, /tmp and others by writing to them


def disk_fault(error: BaseException) -> str | None:
    """The message for an error caused by a full, read-only or broken disk; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return f"{_place(cause)}: {cause.strerror}; {remedy(cause.errno)}"
        if isinstance(cause, FileNotFoundError) and _NO_TEMPORARY in str(cause.strerror):
            return f"{cause.strerror}; free some space, or set TMPDIR to a directory that can be written"
        cause = cause.__cause__ or cause.__context__
    # The same errors as raised by libraries in Rust and C++.
    files = sys.modules.get("deepseek_v2_modeling.checkpoints.full_disk")
    if files is not None and files.is_full(error, short=False):
        return f"{_place(error)}: No space left on device; {remedy(errno.ENOSPC)}"
    return None


def remedy(number: int | None) -> str:
    """What the user can do about an error with this number, for `disk_fault` and messages like it."""
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return (
        "free some space and run the same command again"
        if full
        else "choose another location, or make this one writable"
    )


def _place(error: BaseException) -> str:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return str(name) if name else "the output directory or the one for temporary files"
