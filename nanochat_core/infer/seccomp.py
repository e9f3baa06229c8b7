"""The system calls that a program in the sandbox gives up, as a filter for the kernel (classic BPF).

A second wall behind bubblewrap's, and most of the only one where bubblewrap is missing: no processes, no
sockets, no look into others, no limit raised, nothing on disk made, changed or opened for writing.
"""

import platform
import struct
from typing import Any

# Number of each call on x86_64 and on aarch64 (0: it has none).
CALLS: dict[str, tuple[int, int]] = {
    # new processes and programs
    "fork": (57, 0),
    "vfork": (58, 0),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    # the outside
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # limits, namespaces and the kernel's attic
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "userfaultfd": (323, 282),
    # the file system
    "openat2": (437, 437),
    "creat": (85, 0),
    "truncate": (76, 45),
    "mkdir": (83, 0),
    "mkdirat": (258, 34),
    "mknod": (133, 0),
    "mknodat": (259, 33),
    "rmdir": (84, 0),
    "unlink": (87, 0),
    "unlinkat": (263, 35),
    "rename": (82, 0),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "link": (86, 0),
    "linkat": (265, 37),
    "symlink": (88, 0),
    "symlinkat": (266, 36),
    "chmod": (90, 0),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, 0),
    "fchown": (93, 55),
    "lchown": (94, 0),
    "fchownat": (260, 54),
    "utime": (132, 0),
    "utimes": (235, 0),
    "futimesat": (261, 0),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}
# Calls that open a file for reading, too: their number, and which argument says what for.
OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
WRITING = 0o3 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # DENY: the call fails with EPERM
X32 = 0x40000000  # from here on the same calls under other numbers


def program_filter(machine: str | None = None) -> bytes:
    """The filter for this machine's architecture; ValueError if there is none."""
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise ValueError(f"no filter of system calls is known for {machine}")
    column = list(ARCHITECTURES).index(machine)
    steps: list[tuple[Any, ...]] = [  # (code, jump if true, jump if false, value)
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, DENY),
    ]
    for numbers in CALLS.values():
        if numbers[column]:
            steps += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, DENY)]
    for number, argument in OPENS[machine]:
        steps += [
            (EQUAL, 0, 4, number),
            (LOAD, 0, 0, 16 + 8 * argument),
            (ANY_BIT, 0, 1, WRITING),
            (RETURN, 0, 0, DENY),
            (RETURN, 0, 0, ALLOW),
        ]
    return b"".join(struct.pack("HBBI", *step) for step in [*steps, (RETURN, 0, 0, ALLOW)])
