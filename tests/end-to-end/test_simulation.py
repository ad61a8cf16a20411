"""``vlafleet simulate`` as an ML engineer runs it: Flower's simulation runtime, many sites, one dataset."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from app.dataset import open_dataset
from app.tiny_base import ensure_tiny_base
from certs.errors import RunFailedError
from tests.recorder import record

pytestmark = [pytest.mark.federation, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SITES = [f"site-{number:04d}" for number in range(4)]
# The smallest run: every phase happens, nothing is learnt.
TINY = "rounds=2 local-steps=2 batch-size=1 eval-batches=1 held-out=0.5 seed=5"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine short episodes of different lengths: the four sites' parts differ in size and in frames."""
    return record(tmp_path_factory.mktemp("data") / "all", range(20, 29))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and the sites' state are kept; the tiny model is there."""
    folder = tmp_path_factory.mktemp("home")
    ensure_tiny_base(folder / "models")
    return folder


def simulate(home: Path, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start a simulation whose results go below ``folder``."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlafleet", "simulate", *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env={**os.environ, "VLAFLEET_HOME": str(home), "VLAFLEET_RUNS": str(folder / "runs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def processes(folder: Path) -> list[str]:
    """The command lines of the processes that came of a simulation: all of them know where its runs go."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def until_it_trains(folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not any("ray::ClientAppActor" in line for line in processes(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def left_after(folder: Path, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.fixture(scope="module")
def finished(
    dataset: Path, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A run of two rounds with four sites, two at a time; its output and its folder."""
    folder = tmp_path_factory.mktemp("simulation")
    process = simulate(
        home, folder, "--dataset", dataset, "--sites", 4, "--parallel", 2, "-c", TINY
    )
    output, _ = process.communicate(timeout=800)
    left = processes(folder)
    assert process.returncode == 0, output
    assert left == []
    return output, folder


def test_every_site_takes_part_in_every_round(finished: tuple[str, Path]) -> None:
    _, folder = finished
    rounds = (folder / "runs" / "latest" / "rounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in rounds]
    assert [record["round"] for record in records] == [0, 1, 2]
    for record_ in records:
        assert record_["committed"]
        assert list(record_["sites"]) == SITES
        assert record_["aggregate"]["loss"] > 0
        for site in record_["sites"].values():
            assert site["evaluate"]["state"] == "completed"
            assert site["evaluate"]["loss"] > 0
            assert record_["round"] == 0 or site["train"]["state"] == "completed"


def test_the_sites_share_out_the_episodes(finished: tuple[str, Path], dataset: Path) -> None:
    _, folder = finished
    config = json.loads((folder / "runs" / "latest" / "config.json").read_text())
    assert list(config["sites"]) == SITES
    episodes = []
    for number, site in enumerate(config["sites"].values()):
        assert site["dataset"] == f"all#part={number}/4"
        part = open_dataset(f"{dataset}#part={number}/4", held_out=0.5, seed=5)
        assert site["train_episodes"] == len(part.train_episodes)
        assert site["train_frames"] == part.frames(part.train_episodes)
        assert site["held_out_frames"] == part.frames(part.held_out_episodes)
        episodes.append(part.episodes)
    assert sorted(itertools.chain(*episodes)) == list(range(9))


def test_the_run_ends_with_its_report(finished: tuple[str, Path]) -> None:
    output, _ = finished
    assert "Traceback" not in output
    table = output[output.index("Held-out loss, run ") :]
    for site in SITES:
        assert site in table


def test_a_failed_run_says_why(home: Path, tmp_path: Path) -> None:
    process = simulate(home, tmp_path, "--dataset", tmp_path / "nowhere", "--sites", 2, "-c", TINY)
    output, _ = process.communicate(timeout=400)
    left = processes(tmp_path)
    assert process.returncode == RunFailedError.exit_code
    assert f"dataset directory {tmp_path / 'nowhere'} does not exist" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert left == []


def test_a_killed_simulation_leaves_nothing_running(
    dataset: Path, home: Path, tmp_path: Path
) -> None:
    process = simulate(home, tmp_path, "--dataset", dataset, "--sites", 4, "-c", TINY)
    until_it_trains(tmp_path)
    # Killed outright, it cannot remove its directory; the SuperLink's command line names it.
    directory = re.search(r"/tmp/vlafleet-[^/ ]+", " ".join(processes(tmp_path)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The kernel ends the others; a ray worker that was just starting looks for its server for a minute.
    assert left_after(tmp_path, 120) == []
    assert directory
    shutil.rmtree(directory[0])


def test_ctrl_c_ends_it(dataset: Path, home: Path, tmp_path: Path) -> None:
    process = simulate(home, tmp_path, "--dataset", dataset, "--sites", 4, "-c", TINY)
    until_it_trains(tmp_path)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    left = processes(tmp_path)
    assert process.returncode == 130, output
    assert left == []
