"""Disk and memory are judged by what a run takes, less what the site holds already."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from certs import memory
from supernode import capacity
from supernode.findings import size
from supernode.site import Site

GB = 10**9
ESTIMATE: dict[str, Any] = {
    "state_bytes": 3 * GB,
    "cache_tier": "disk",
    "cache_bytes": 20 * GB,
    "memory_bytes": 8 * GB,
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(
        *(tmp_path / "vlafleet-site-a", "test", "site-a", "superlink:9092", "enrol:9093"),
        *("/data", "cpu", "native"),
    )
    made.prepare()
    return made


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The disk's free bytes, for a test to set."""
    held = {"free": 100 * GB}
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(
        "supernode.capacity.shutil.disk_usage", lambda _: usage(200 * GB, 0, held["free"])
    )
    return held


@pytest.mark.parametrize(
    ("room", "level", "code", "says"),
    [
        (100 * GB, "ok", 0, "100 GB free for {state} and {cache}; a run takes up to 23 GB more"),
        (23.2 * GB, "ok", 0, "a run takes up to 23 GB more"),
        (
            22.9 * GB,
            "warning",
            0,
            "a run takes 23 GB more, 20 GB of it for the cache of what the frozen",
        ),
        (3.2 * GB, "warning", 0, "3.2 GB free for {state} and {cache}, and a run takes 23 GB more"),
        (
            2.9 * GB,
            "fail",
            19,
            "2.9 GB free for {state} and {cache}, and a run's state takes 3.0 GB more",
        ),
        (
            0,
            "fail",
            19,
            "0 bytes free for {state} and {cache}, and a run's state takes 3.0 GB more",
        ),
    ],
)
def test_the_disk(
    site: Site, free: dict[str, int], room: float, level: str, code: int, says: str
) -> None:
    free["free"] = int(room)
    (finding,) = capacity.disk(site, ESTIMATE)
    assert (finding.name, finding.level, finding.exit_code) == ("disk", level, code)
    assert says.format(state=site.state, cache=site.cache) in finding.sentence
    assert (finding.remedy is None) == (level == "ok")
    if level != "ok":
        assert "--directory on a larger disk" in (finding.remedy or "")


def test_what_the_site_holds_needs_no_room(site: Site, free: dict[str, int]) -> None:
    # Written, for a sparse file takes no room.
    (site.state / "run").mkdir()
    (site.state / "run" / "model").write_bytes(os.urandom(4 << 20))
    (site.cache / "frames").write_bytes(os.urandom(2 << 20))
    needs = {**ESTIMATE, "state_bytes": 5 << 20, "cache_bytes": 1 << 20}
    (finding,) = capacity.disk(site, needs)
    assert finding.level == "ok"
    assert finding.sentence.endswith("a run takes up to 1.0 MB more")


@pytest.mark.parametrize("tier", ["gpu", "memory", "none"])
def test_a_cache_elsewhere_needs_no_disk(site: Site, free: dict[str, int], tier: str) -> None:
    free["free"] = int(3.2 * GB)
    (finding,) = capacity.disk(site, {**ESTIMATE, "cache_tier": tier})
    assert finding.level == "ok"
    assert finding.sentence.endswith("a run takes up to 3.0 GB more")


def test_a_disk_without_an_estimate(site: Site, free: dict[str, int]) -> None:
    (finding,) = capacity.disk(site, None)
    assert finding.level == "ok"
    assert finding.sentence.endswith("; what a run takes was not estimated")
    free["free"] = 50_000_000
    (finding,) = capacity.disk(site, None)
    assert (finding.level, finding.exit_code) == ("fail", 19)
    assert finding.sentence.startswith("50 MB free for ")
    assert finding.sentence.endswith(", and that is as good as full")


def test_a_directory_that_cannot_be_written(
    site: Site, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root writes anywhere: the answer of access(2) is stood in for."""
    monkeypatch.setattr("supernode.capacity.os.access", lambda path, _: path != site.cache)
    (finding,) = capacity.disk(site, ESTIMATE)
    assert (finding.level, finding.exit_code) == ("fail", 19)
    assert finding.sentence == f"{site.cache} cannot be written"


def test_directories_that_are_not_made_yet(site: Site) -> None:
    shutil.rmtree(site.directory)
    (finding,) = capacity.disk(site, None)
    assert finding.name == "disk"
    assert not site.directory.exists()


@pytest.mark.parametrize(
    ("available", "limit", "level", "code"),
    [
        (16 * GB, 32 * GB, "ok", 0),
        (6 * GB, 32 * GB, "warning", 0),
        (6 * GB, 7 * GB, "fail", 22),
    ],
)
def test_memory(
    monkeypatch: pytest.MonkeyPatch, available: int, limit: int, level: str, code: int
) -> None:
    monkeypatch.setattr(memory, "available", lambda: available)
    monkeypatch.setattr(memory, "limit", lambda: limit)
    finding = capacity.host(ESTIMATE)
    assert (finding.name, finding.level, finding.exit_code) == ("memory", level, code)
    assert finding.sentence.startswith(f"{size(available)} of {size(limit)} of memory free")
    assert "training takes about 8.0 GB" in finding.sentence
    assert (finding.remedy is None) == (level == "ok")


def test_memory_without_an_estimate() -> None:
    finding = capacity.host(None)
    assert finding.level == "ok"
    assert finding.sentence.endswith("; what training takes was not estimated")
