"""How much memory a cache may fill: of the GPU, of the host, and of a disk, each with a reserve for everything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from certs.memory import available, mounts

if TYPE_CHECKING:
    import torch

GiB = 1 << 30

# Each reserve is at most half of what is free, so that small machines have a cache too.
# SmolVLA's gradients and moments take 1.2 GB, its activations at batch 64 some 3 GB with the prefix cached; the rest is
# for evaluation, which runs the vision tower, for workspaces and for fragmentation.
_GPU_RESERVE = 8 * GiB
# The round's model, answer and residual are 0.4 GB each, moments being written 0.8 GB; decoders and the site's other
# processes take about one more, and two are the file system's.
_HOST_RESERVE = 6 * GiB
# The site's state (2.8 GB for each of two runs), a download of the base, and what else shares the disk.
_DISK_RESERVE = 20 * GiB


def gpu(device: torch.device) -> int:
    """Bytes that may be filled on a CUDA device."""
    import torch

    # What torch holds for nobody counts as free.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return _usable(free, _GPU_RESERVE)


def host(root: Path = Path("/")) -> int:
    """Bytes of host memory that may be filled; ``root`` is where ``proc`` and ``sys`` lie."""
    return _usable(available(root), _HOST_RESERVE)


def disk(folder: Path, reclaimable: int = 0, root: Path = Path("/")) -> int:
    """Bytes that may be filled below ``folder``, which need not exist; 0 where it cannot be written.

    ``reclaimable`` bytes would be removed first. What lies in a tmpfs is host memory, and counts as such.
    """
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return 0
    status = os.statvfs(folder)
    usable = _usable(status.f_bavail * status.f_frsize + reclaimable, _DISK_RESERVE)
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if any(mount[2] == number and kind == "tmpfs" for mount, kind, _ in mounts(root)):
        return min(usable, host(root) + reclaimable)
    return usable


def _usable(free: int, reserve: int) -> int:
    return free - min(free // 2, reserve)
