"""One program that a model wrote, run within limits: `surgery.evaluation.sandbox` starts this file in a process of its own.

The first line of standard input is a secret, which is written to standard output if the program comes to its end. Before the
program begins, a seccomp filter takes the network, new processes, signals to others, and every way to change a file from
this process for good. This file imports nothing but Python's own library.
"""

import contextlib
import ctypes
import errno
import io
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator

SECONDS = 5  # of processor time
MEMORY = 2 << 30  # bytes of address space

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # what a filter may answer
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE = 0, 4  # places in what a filter is asked about
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OTHER_NUMBERS = 0x40000000  # of x86-64's second set of system calls

# Machine -> its name in the kernel; the calls that are refused; of those that open a file, which argument has the flags.
CALLS: dict[str, tuple[int, tuple[int, ...], dict[int, int]]] = {
    "x86_64": (
        0xC000003E,
        (
            *(41, 425),  # socket, io_uring_setup
            *(56, 57, 58, 59, 322),  # clone, fork, vfork, execve, execveat
            *(62, 200, 234, 424, 434, 101, 310, 311),  # kill, tkill, tgkill, pidfd_*, ptrace, process_vm_*
            *(155, 160, 161, 165, 166, 272, 302, 308, 321),  # pivot_root, setrlimit, chroot, mount, …, bpf
            *(248, 249, 250),  # keys
            *(76, 77, 285),  # truncate, ftruncate, fallocate
            *(82, 83, 84, 85, 86, 87, 88, 133),  # rename, mkdir, rmdir, creat, link, unlink, symlink, mknod
            *(258, 259, 263, 264, 265, 266, 316),  # the same relative to a folder
            *(90, 91, 92, 93, 94, 260, 268, 452),  # chmod, chown
            *(132, 235, 261, 280),  # times
            *(188, 189, 190, 197, 198, 199),  # extended attributes
        ),
        {2: 1, 257: 2},  # open, openat
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(198, 425),
            *(220, 221, 281),
            *(129, 130, 131, 424, 434, 117, 270, 271),
            *(41, 164, 51, 40, 39, 97, 261, 268, 280),
            *(217, 218, 219),
            *(45, 46, 47),
            *(33, 34, 35, 36, 37, 38, 276),
            *(52, 53, 54, 55, 452),
            88,
            *(5, 6, 7, 14, 15, 16),
        ),
        {56: 2},
    ),
}
UNKNOWN = (435, 437)  # clone3, openat2: as if the kernel had none, so that the C library takes the calls above


def restrict() -> None:
    """Set the limits.

    Raises:
        OSError: the system does not let them be set.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if platform.machine() not in CALLS or sys.platform != "linux":
        raise OSError(errno.ENOSYS, f"no filter of system calls is known for {sys.platform} on {platform.machine()}")
    steps = b"".join(struct.pack("HBBI", *step) for step in _filter(*CALLS[platform.machine()]))
    held = ctypes.create_string_buffer(steps, len(steps))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))

    program = Program(len(steps) // 8, ctypes.cast(held, ctypes.c_void_p))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _filter(kernel: int, refused: tuple[int, ...], opens: dict[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """The steps of a filter: (what, steps to skip if so, steps to skip if not, number)."""
    yield LOAD, 0, 0, ARCHITECTURE
    yield EQUAL, 1, 0, kernel
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, NUMBER
    yield AT_LEAST, 0, 1, OTHER_NUMBERS
    yield RETURN, 0, 0, KILL
    for calls, answer in ((refused, errno.EPERM), (UNKNOWN, errno.ENOSYS)):
        for call in calls:
            yield EQUAL, 0, 1, call
            yield RETURN, 0, 0, ERRNO | answer
    for call, argument in opens.items():
        yield EQUAL, 0, 4, call
        yield LOAD, 0, 0, 16 + 8 * argument
        yield ANY_BIT, 0, 1, WRITES
        yield RETURN, 0, 0, ERRNO | errno.EPERM
        yield RETURN, 0, 0, ALLOW
    yield RETURN, 0, 0, ALLOW


def main() -> None:
    """Run the program."""
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    restrict()
    sys.stdin = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(1, secret)


if __name__ == "__main__":
    main()
