"""The system call filter of a sandbox, as the BPF program that bubblewrap installs before it starts Python.

Namespaces hide files, processes and networks. The filter forbids what could use memory beyond the limits of a process
(other processes, memory files, socket buffers, attributes of files), and parts of the kernel that are of no use in a
sandbox.
"""

import errno
import platform
import struct
from typing import NamedTuple


class Machine(NamedTuple):
    """Numbers of an architecture. audit: its AUDIT_ARCH value. clone: the only call that may start threads. without:
    calls that fail with ENOSYS, so that the C library falls back to an older one. forbidden: calls that fail with
    EPERM."""

    audit: int
    clone: int
    without: tuple[int, ...]
    forbidden: tuple[int, ...]


# fork vfork socket socketpair connect bind listen ptrace shmget msgget semget mq_open memfd_create
# unshare setns mount umount2 pivot_root chroot keyctl add_key request_key bpf perf_event_open userfaultfd
# io_uring_setup process_vm_readv process_vm_writev open_by_handle_at kexec_load init_module finit_module
# move_mount open_tree fsopen fsmount mount_setattr memfd_secret swapon reboot personality
# setxattr lsetxattr fsetxattr setxattrat inotify_init inotify_init1 inotify_add_watch fanotify_init
MACHINES = {
    "x86_64": Machine(
        0xC000003E,
        56,
        (435,),
        (
            57, 58, 41, 53, 42, 49, 50, 101, 29, 68, 64, 240, 319,
            272, 308, 165, 166, 155, 161, 250, 248, 249, 321, 298, 323,
            425, 310, 311, 304, 246, 175, 313,
            429, 428, 430, 432, 442, 447, 167, 169, 135,
            188, 189, 190, 463, 253, 294, 254, 300,
        ),
    ),
    "aarch64": Machine(
        0xC00000B7,
        220,
        (435,),
        (
            198, 199, 203, 200, 201, 117, 194, 186, 190, 180, 279,
            97, 268, 40, 39, 41, 51, 219, 217, 218, 280, 241, 282,
            425, 270, 271, 265, 104, 105, 273,
            429, 428, 430, 432, 442, 447, 224, 142, 92,
            5, 6, 7, 463, 26, 27, 262,
        ),
    ),
}  # fmt: skip
_X32 = 0x40000000  # start of x86_64's second set of call numbers
_CLONE_THREAD = 0x00010000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in the kernel's seccomp_data


def program(machine: str | None = None) -> bytes | None:
    """The filter for this machine; None if its architecture is not listed here."""
    listed = MACHINES.get(machine or platform.machine())
    if listed is None:
        return None
    refuse, unknown = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, listed.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers, verdict in ((listed.without, unknown), (listed.forbidden, refuse)):
        for number in numbers:
            steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, verdict)]
    steps += [
        (_EQUAL, 0, 3, listed.clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, refuse),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
