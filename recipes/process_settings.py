"""Keeps memory that a run frees within the process."""

import ctypes
from contextlib import suppress

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGE = 2**30  # bytes


def keep_freed_memory() -> None:
    """glibc gives freed blocks of over 32 MB back to the system, which then has to zero new ones at each step.

    That is a quarter of the time of long float32 steps on a CPU (docs/log.md); to keep them costs a tenth more memory
    at the peak. With another C library this does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, NEVER)
