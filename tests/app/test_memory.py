"""How much a cache may fill: the least of what the kernel and the control groups say, less a reserve."""

import os
from pathlib import Path

import pytest

from app import memory
from app.memory import GiB


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def machine(root: Path, available: int, group: str, mounts: str, **files: object) -> Path:
    """A ``proc`` and ``sys`` with so many bytes available, and this process in ``group``."""
    return write(
        root,
        {
            "proc/meminfo": f"MemTotal: 999 kB\nMemAvailable: {available >> 10} kB",
            "proc/self/cgroup": group,
            "proc/self/mountinfo": mounts,
            **files,
        },
    )


TWO = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
NONE = "24 27 0:6 / /dev rw - devtmpfs devtmpfs rw"
ONE = "31 23 0:28 /docker/abc /sys/fs/cgroup/memory rw master:9 - cgroup cgroup rw,memory"


def test_without_a_group_the_kernels_figure_counts(tmp_path: Path) -> None:
    assert memory.host(machine(tmp_path, 100 * GiB, "0::/", NONE)) == 94 * GiB


def test_at_most_half_of_a_small_machine_is_reserved(tmp_path: Path) -> None:
    assert memory.host(machine(tmp_path, 4 * GiB, "0::/", NONE)) == 2 * GiB


def test_a_group_of_version_2_counts_with_the_page_cache_it_can_drop(tmp_path: Path) -> None:
    root = machine(tmp_path, 100 * GiB, "0::/a/b", TWO)
    write(
        root / "sys/fs/cgroup/a/b",
        {
            "memory.max": 40 * GiB,
            "memory.high": 30 * GiB,
            "memory.current": 10 * GiB,
            "memory.stat": f"anon 1\ninactive_file {4 * GiB}\nactive_file 5",
        },
    )
    assert memory.host(root) == (30 - 10 + 4 - 6) * GiB


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, 100 * GiB, "0::/a/b", TWO)
    for group, limit in (("a/b", "max"), ("a", 20 * GiB)):
        write(
            root / "sys/fs/cgroup" / group,
            {
                "memory.max": limit,
                "memory.high": "max",
                "memory.current": 0,
                "memory.stat": "inactive_file 0",
            },
        )
    assert memory.host(root) == 14 * GiB


@pytest.mark.parametrize("group", ["/docker/abc", "/elsewhere/on/the/host"])
def test_a_container_of_version_1_finds_its_group_at_the_top(tmp_path: Path, group: str) -> None:
    root = machine(tmp_path, 100 * GiB, f"4:cpu,memory:{group}\n0::/", ONE)
    write(
        root / "sys/fs/cgroup/memory",
        {
            "memory.limit_in_bytes": 20 * GiB,
            "memory.usage_in_bytes": 5 * GiB,
            "memory.stat": f"inactive_file 7\ntotal_inactive_file {1 * GiB}",
        },
    )
    assert memory.host(root) == (20 - 5 + 1 - 6) * GiB


def test_a_group_that_is_over_its_limit_has_no_room(tmp_path: Path) -> None:
    root = machine(tmp_path, 100 * GiB, "0::/", TWO)
    write(
        root / "sys/fs/cgroup",
        {"memory.max": GiB, "memory.current": 2 * GiB, "memory.stat": "inactive_file 0"},
    )
    assert memory.host(root) == 0


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory.host() < total
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    # Other processes write, too.
    assert memory.disk(tmp_path / "not" / "there") == pytest.approx(
        free - min(free // 2, 20 * GiB), rel=0.05
    )


def test_what_would_be_removed_counts_as_free(tmp_path: Path) -> None:
    more = memory.disk(tmp_path, 1000 * GiB) - memory.disk(tmp_path)
    assert more >= 980 * GiB


def test_a_tmpfs_is_host_memory(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    mounts = f"1 2 {os.major(device)}:{os.minor(device)} / /mnt rw - tmpfs tmpfs rw"
    root = machine(tmp_path, 4 << 20, "0::/", mounts)
    assert memory.disk(tmp_path, root=root) == 2 << 20


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_disk_that_cannot_be_written_has_no_room(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert memory.disk(closed / "cache") == 0
