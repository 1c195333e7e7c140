"""The limits of a guest process, which it sets for itself before anything else."""

import resource
import sys

OPEN_FILES = 64


def limit(seconds, memory, files):
    """seconds: of CPU time. memory: address space in bytes. files: maximum file size in bytes."""
    sys.set_int_max_str_digits(0)
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: files,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for resource_id, maximum in limits.items():
        hard = resource.getrlimit(resource_id)[1]
        maximum = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
        resource.setrlimit(resource_id, (maximum, maximum))
