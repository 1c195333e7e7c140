"""The limits of a guest's process, set in it before anything else."""

import resource
import sys

OPEN_FILES = 64


def limit(seconds, memory, files):
    """seconds: of CPU. memory: bytes of address space. files: the longest file, in bytes."""
    sys.set_int_max_str_digits(0)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: files,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
