"""A process that ends when its parent does, however the parent ends (prctl(2), PR_SET_PDEATHSIG; Linux)."""

import ctypes
import os

# Loaded here: between fork and exec a child should do as little as it can.
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent(signal: int) -> None:
    """Have the kernel send this process ``signal`` when its parent ends, even by SIGKILL."""
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal)
    if os.getppid() != parent:  # it ended before the request reached the kernel
        os.kill(os.getpid(), signal)
