"""Processes that end with the one that started them, however it ends (prctl(2); Linux)."""

import contextlib
import ctypes
import os
import signal
from pathlib import Path

# Loaded here: between fork and exec a child should do as little as it can.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(number: int) -> None:
    """Have the kernel send this process the signal ``number`` when its parent ends, even by SIGKILL."""
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the request reached the kernel
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Have the kernel give this process the descendants whose parents end before them."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill and reap every child of this process, and with ``adopt_orphans`` every descendant."""
    # The kernel lists children by the thread that has them; it gives orphans to the main one.
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    # A child's own children are orphans once it is reaped, and found by the next look.
    while found := children.read_text().split():
        for child in map(int, found):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
