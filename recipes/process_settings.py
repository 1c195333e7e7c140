"""Keeps freed memory within the process."""

import ctypes
from contextlib import suppress

# from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = -1
LARGE = 2**30  # bytes


def keep_freed_memory() -> None:
    """Stop glibc from returning freed blocks of over 32 MB to the system, which has to zero new ones at each step.

    That takes a quarter of the time of long float32 steps on a CPU (docs/log.md); keeping them costs 10 % more peak
    memory. Does nothing with another C library.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, NEVER)
