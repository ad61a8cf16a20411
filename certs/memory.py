"""How much memory a process may have: the machine's, within the limits of its control groups.

In a container the kernel's own figure is the whole machine's: the control group's limit counts as well
(https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html).
``root`` is where ``proc`` and ``sys`` lie.
"""

from collections.abc import Iterator
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Bytes that this process may fill now: the least of the kernel's figure and the control groups' room."""
    rooms = [room for folder in _groups(root) if (room := _room(folder)) is not None]
    return min([_machine(root, "MemAvailable"), *rooms])


def limit(root: Path = Path("/")) -> int:
    """Bytes that this process could fill were nothing else running: the machine's, or a control group's limit."""
    limits = [most for folder in _groups(root) if (most := _limit(folder)) is not None]
    return min([_machine(root, "MemTotal"), *limits])


def mounts(root: Path) -> Iterator[tuple[list[str], str, str]]:
    """Each mount's leading fields, type and options (proc_pid_mountinfo(5))."""
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        yield left.split(" "), kind, options


def _machine(root: Path, figure: str) -> int:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{figure}:"))


def _groups(root: Path) -> Iterator[Path]:
    """The memory control groups of this process, of both versions, each with those above it."""
    paths: dict[str, str] = {}
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for mount, kind, options in mounts(root):
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


def _limit(folder: Path) -> int | None:
    """A control group's limit in bytes; None where it sets none."""
    names = ("memory.limit_in_bytes", "memory.max", "memory.high")
    texts = [(folder / name).read_text().strip() for name in names if (folder / name).exists()]
    return min((int(text) for text in texts if text != "max"), default=None)


def _room(folder: Path) -> int | None:
    """Bytes below a control group's limit, with page cache that is not in use; None where it sets no limit."""
    most = _limit(folder)
    if most is None:
        return None
    one = (folder / "memory.limit_in_bytes").exists()
    usage = folder / ("memory.usage_in_bytes" if one else "memory.current")
    unused = "total_inactive_file" if one else "inactive_file"
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(most - int(usage.read_text()) + int(counts.get(unused, 0)), 0)
    except FileNotFoundError:  # the root group of version 2 has no usage
        return None
