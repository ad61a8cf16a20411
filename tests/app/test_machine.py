"""What an answer says of the site's machine; NVML and the clock are stood in for, the disk is real."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app import machine
from app.machine import Machine
from certs import nvml
from certs.nvml import Driver, Gpu, NoDriverError

GB = 10**9
FIRST = Gpu("GPU-aaaa-1", "NVIDIA H100", 80 * GB, 79 * GB, (9, 0), 0, 0.0)
SECOND = Gpu("GPU-bbbb-2", "NVIDIA A10", 24 * GB, 20 * GB, (8, 6), 1, 0.5)


@dataclasses.dataclass
class Bench:
    """A machine with two GPUs, of which CUDA counts the second first, and a clock."""

    now: float = 100.0
    gpus: list[Gpu] = dataclasses.field(default_factory=lambda: [FIRST, SECOND])
    failure: Exception | None = None
    looks: int = 0

    def read(self) -> Driver:
        self.looks += 1
        if self.failure:
            raise self.failure
        return Driver("580.65.06", (13, 0), self.gpus)

    def at(self, seconds: float, used: int, busy: float | None) -> None:
        """From then on the second GPU is like this."""
        assert SECOND.total
        self.now = 100.0 + seconds
        self.gpus[1] = dataclasses.replace(SECOND, free=SECOND.total - used, utilization=busy)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    bench = Bench()
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: bench.now))
    monkeypatch.setattr(nvml, "read", bench.read)
    uuids = {"cuda:0": "bbbb-2", "cuda:1": "aaaa-1", "cuda:2": "part-of-one"}

    def properties(device: torch.device) -> Any:
        return SimpleNamespace(uuid=uuids[str(device)])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return bench


def figures(watched: Machine) -> dict[str, Any]:
    """Those of the GPU."""
    return {k: v for k, v in watched.figures().items() if k.startswith("gpu_")}


def test_the_gpu_that_trains_is_looked_at_now_and_then(bench: Bench) -> None:
    """Whatever CUDA_VISIBLE_DEVICES makes of the order; memory at its most, utilization on average."""
    watched = Machine(torch.device("cuda:0"))
    for seconds, used, busy in ((1, 8, 0.9), (5, 23, 0.0), (12, 12, 0.5), (20, 9, 0.0)):
        bench.at(seconds, used * GB, busy)
        watched.look()
    # Two of the four moments were too close to the one before.
    assert bench.looks == 2
    assert figures(watched) == {
        "gpu_memory_bytes": 12 * GB,
        "gpu_memory_total_bytes": 24 * GB,
        "gpu_utilization": pytest.approx(0.7),
    }


def test_what_the_driver_does_not_tell_is_left_out(bench: Bench) -> None:
    bench.at(0, 8 * GB, None)
    watched = Machine(torch.device("cuda:0"))
    watched.look()
    assert figures(watched) == {
        "gpu_memory_bytes": 8 * GB,
        "gpu_memory_total_bytes": 24 * GB,
    }
    bench.gpus[1] = dataclasses.replace(SECOND, total=None, free=None)
    watched = Machine(torch.device("cuda:0"))
    watched.look()
    assert figures(watched) == {"gpu_utilization": 0.5}
    part = Machine(torch.device("cuda:2"))
    part.look()
    assert figures(part) == {}
    bench.failure = NoDriverError("the NVIDIA driver is not loaded")
    lost = Machine(torch.device("cuda:0"))
    lost.look()
    assert figures(lost) == {}


def test_a_site_without_a_gpu_asks_no_driver(bench: Bench) -> None:
    watched = Machine(torch.device("cpu"))
    watched.look()
    assert figures(watched) == {}
    assert bench.looks == 0


@pytest.mark.usefixtures("bench")
@pytest.mark.parametrize("state", ["home/sites", "home", ""])
def test_the_disk_is_the_one_that_holds_the_sites_state(state: str, tmp_path: Path) -> None:
    """Also before the site has any."""
    (tmp_path / state).mkdir(parents=True, exist_ok=True)
    expected = shutil.disk_usage(tmp_path)
    found = Machine(torch.device("cpu")).figures()
    assert found["disk_size_bytes"] == expected.total
    assert found["disk_free_bytes"] == pytest.approx(expected.free, rel=0.1)
