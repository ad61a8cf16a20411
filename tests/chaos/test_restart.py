"""A real federation whose ServerApp and SuperLink are killed in mid-round ends in the same model, to the bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app.journal import read_config, read_rounds
from certs.errors import ConnectionRefusedByFleetError
from certs.processes import Processes
from superlink.control import Control, RunStatus, run_request
from superlink.demo import federation
from tests.recorder import record

ROOT = Path(__file__).parents[2]
TINY = "rounds=2 local-steps=2 batch-size=2 eval-batches=2 round-timeout=240"
# Far beyond what a run of this size takes on a busy machine.
SECONDS = 400


def wait_for[T](look: Callable[[], T | None], what: str) -> T:
    deadline = time.monotonic() + SECONDS
    while (found := look()) is None:
        assert time.monotonic() < deadline, f"no {what} within {SECONDS} s"
        time.sleep(0.2)
    return found


def finished(control: Control, run: int) -> RunStatus:
    def look() -> RunStatus | None:
        try:
            status = control.status(run)
        except ConnectionRefusedByFleetError:  # while the SuperLink is away
            return None
        return status if status.status == "finished" else None

    return wait_for(look, f"end of run {run}")


def child_of(parent: int, program: str) -> int:
    """The process id of ``program``, started by ``parent``."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        if program in command and int(stat.rpartition(")")[2].split()[1]) == parent:
            return int(entry.name)
    raise AssertionError(f"{program} does not run")


def training(processes: Processes, number: int) -> None:
    """Return while site-a is in the middle of its part of a round."""
    log = processes.logs / "superexec-site-a.log"
    started = log.stat().st_size

    def look() -> bool | None:
        with log.open(errors="replace") as file:
            file.seek(started)
            return f"round {number}/2 train: ready" in file.read() or None

    wait_for(look, f"training in round {number}")


@pytest.mark.slow
@pytest.mark.federation
def test_killed_processes_change_no_bit(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    datasets = {
        "site-a": str(record(tmp_path / "a", (30, 35, 40))),
        "site-b": str(record(tmp_path / "b", (45, 30, 35))),
    }
    runs = tmp_path / "runs"
    with federation(tmp_path / "federation", datasets, runs, free_port()) as (control, processes):
        whole = control.start(run_request(ROOT, [TINY]))
        assert finished(control, whole).sub_status == "completed"

        broken = control.start(run_request(ROOT, [TINY]))
        training(processes, 1)
        superexec = processes.running["superexec-superlink"].pid
        os.kill(child_of(superexec, "vlafleet-serverapp"), signal.SIGKILL)
        wait_for(lambda: (runs / str(broken) / "config.json").exists() or None, "record")

        resumed = control.start(run_request(ROOT, ["resume=true"]))
        training(processes, 2)
        superlink = processes.running["superlink"]
        superlink.kill()
        superlink.wait()
        # Long enough for everybody to meet a closed port.
        time.sleep(3)
        arguments = superlink.args
        assert isinstance(arguments, list)
        processes.start("superlink", *map(str, arguments[3:]))
        status = finished(control, resumed)
        assert status.sub_status == "completed", status
        # Flower notices that the first one's ServerApp is gone; nobody else is to be told.
        assert finished(control, broken).sub_status == "failed"
    records = read_rounds(runs / str(whole))
    again = read_rounds(runs / str(broken))
    assert not (runs / str(resumed)).exists()
    assert read_config(runs / str(broken))["runs"] == [str(broken), str(resumed)]
    assert [record["round"] for record in again] == [0, 1, 2]
    assert [record["model"] for record in again] == [record["model"] for record in records]
    losses = [[record["aggregate"]["loss"] for record in read] for read in (again, records)]
    assert losses[0] == losses[1]
    assert all(record["committed"] for record in again)
    first, second = (
        (runs / str(run) / "checkpoints" / "latest" / "model.safetensors").read_bytes()
        for run in (whole, broken)
    )
    assert first == second
