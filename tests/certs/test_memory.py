"""What a process could have of memory, and what it may have now."""

import os
from pathlib import Path

import pytest

from certs.memory import available, limit

GIB = 1 << 30
TWO = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB with half of them free, and this process two groups deep."""
    files = {
        "proc/meminfo": f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {32 * GIB >> 10} kB",
        "proc/self/cgroup": "0::/a/b",
        "proc/self/mountinfo": TWO,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    return tmp_path


def group(root: Path, name: str, most: int | str, used: int) -> None:
    folder = root / "sys/fs/cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("inactive_file 0\n")


def test_without_limits_the_machine_is_the_limit(root: Path) -> None:
    group(root, "a/b", "max", GIB)
    assert (available(root), limit(root)) == (32 * GIB, 64 * GIB)


def test_the_tightest_group_is_the_limit(root: Path) -> None:
    group(root, "a", 16 * GIB, 10 * GIB)
    group(root, "a/b", 20 * GIB, 10 * GIB)
    assert (available(root), limit(root)) == (6 * GIB, 16 * GIB)


def test_a_group_larger_than_the_machine_limits_nothing(root: Path) -> None:
    group(root, "a", 1000 * GIB, GIB)
    assert (available(root), limit(root)) == (32 * GIB, 64 * GIB)


def test_this_machine(tmp_path: Path) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available() < total
    assert available() <= limit() <= total
