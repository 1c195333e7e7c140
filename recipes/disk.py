"""Describes a full, read-only or broken disk in one line."""

import errno
import sys
import tempfile

_REFUSED = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not writable
    *(errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR),
}


def disk_fault(error: BaseException) -> str | None:
    """The message for an error caused by a full, read-only or broken disk; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _REFUSED:
            return f"{_place(cause)}: {cause.strerror}; {_remedy(cause.errno)}"
        cause = cause.__cause__ or cause.__context__
    # The same errors as raised by libraries in Rust and C++.
    files = sys.modules.get("deepseek_v2_modeling.checkpoints.full_disk")
    if files is not None and files.is_full(error, short=False):
        return f"{_place(error)}: No space left on device; {_remedy(errno.ENOSPC)}"
    return None


def _remedy(number: int) -> str:
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return (
        "free some space and run the same command again"
        if full
        else "choose another location, or make this one writable"
    )


def _place(error: BaseException) -> str:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return str(name) if name else f"the output directory or {tempfile.gettempdir()}"
