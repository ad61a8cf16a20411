"""How much memory a cache may fill: of the GPU, of the host, and of a disk, each with a reserve for everything else.

In a container the kernel's own figure is the whole machine's: the control group's limit counts as well
(https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
# The site's state (2.8 GB for two runs), a download of the base, and what else shares the disk.
_DISK_RESERVE = 20 * GiB


def gpu(device: torch.device) -> int:
    """Bytes that may be filled on a CUDA device."""
    import torch

    # What torch holds for nobody counts as free.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return _usable(free, _GPU_RESERVE)


def host(root: Path = Path("/")) -> int:
    """Bytes of host memory that may be filled: the least of the kernel's figure and the control groups' room.

    ``root`` is where ``proc`` and ``sys`` lie.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable:" in line)
    rooms = [room for folder in _groups(root) if (room := _room(folder)) is not None]
    return _usable(min([available, *rooms]), _HOST_RESERVE)


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
    if any(mount[2] == number and kind == "tmpfs" for mount, kind, _ in _mounts(root)):
        return min(usable, host(root) + reclaimable)
    return usable


def _usable(free: int, reserve: int) -> int:
    return free - min(free // 2, reserve)


def _mounts(root: Path) -> Iterator[tuple[list[str], str, str]]:
    """Each mount's leading fields, type and options (proc_pid_mountinfo(5))."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        yield left.split(" "), kind, options


def _groups(root: Path) -> Iterator[Path]:
    """The memory control groups of this process, of both versions, each with those above it."""
    paths: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for mount, kind, options in _mounts(root):
        if kind == "cgroup2":
            controller = ""
        elif kind == "cgroup" and "memory" in options.split(","):
            controller = "memory"
        else:
            continue
        if controller not in paths:
            continue
        top = root / mount[4].lstrip("/")
        # A container sees its own group as the top of the mount, and may still be told its path on the host.
        inside = Path(paths[controller])
        folder = top / inside.relative_to(mount[3]) if inside.is_relative_to(mount[3]) else top
        while True:
            yield folder
            if folder == top:
                break
            folder = folder.parent


def _room(folder: Path) -> int | None:
    """Bytes below a control group's limit, with page cache that is not in use; None where it sets no limit."""
    one = (folder / "memory.limit_in_bytes").exists()
    names = ["memory.limit_in_bytes"] if one else ["memory.max", "memory.high"]
    usage = folder / ("memory.usage_in_bytes" if one else "memory.current")
    unused = "total_inactive_file" if one else "inactive_file"
    try:
        texts = [(folder / name).read_text().strip() for name in names if (folder / name).exists()]
        limits = [int(text) for text in texts if text != "max"]
        if not limits:
            return None
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(min(limits) - int(usage.read_text()) + int(counts.get(unused, 0)), 0)
    except FileNotFoundError:  # the root group of version 2 has no limit and no usage
        return None
