"""A site's trainer is killed in mid-step, and a run is stopped in mid-step: the site says why, and trains again."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from app import trainer_client, trainer_wire
from app.journal import read_rounds
from certs.errors import RunFailedError
from certs.processes import Processes
from superlink.control import Control, run_request
from superlink.demo import federation
from tests.recorder import record

ROOT = Path(__file__).parents[2]
# Some seconds of steps, so that there is a middle.
KILLED = "rounds=2 local-steps=100 batch-size=2 eval-batches=1 min-sites=1"
# Hours of steps.
STOPPED = "rounds=1 local-steps=1000000 batch-size=2 eval-batches=1 min-sites=1"
AFTER = "rounds=1 local-steps=2 batch-size=2 eval-batches=1 min-sites=1"
# What a loaded machine may take for a wait that must end; the tested bound is its own.
LONG = 400.0


def until[T](look: Callable[[], T], what: str, processes: Processes) -> T:
    deadline = time.monotonic() + LONG
    while not (found := look()):
        processes.check()
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


class Trainer:
    """The trainer of a site, found by what its SuperExec logs."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @property
    def socket(self) -> Path:
        found = re.search(r"the trainer listens at (\S+)", self.log.read_text())
        assert found
        return Path(found[1])

    def pid(self) -> int:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            return int(trainer_wire.receive(connection)[0]["pid"])

    def steps(self) -> bool:
        """Whether it is between the first and the last step of a round's training."""
        try:
            text = trainer_client.metrics(self.socket)
        except RunFailedError:  # it starts
            return False
        step = re.search(r"^vlafleet_trainer_step (\S+)$", text, re.MULTILINE)
        busy = re.search(r"^vlafleet_trainer_busy 1.0$", text, re.MULTILINE)
        return bool(busy and step and float(step[1]) > 0)

    def jobs(self, result: str) -> float:
        text = trainer_client.metrics(self.socket)
        found = re.search(rf'jobs_total{{kind="train",result="{result}"}} (\S+)', text)
        return float(found[1]) if found else 0.0


def finished(control: Control, run: int, processes: Processes) -> str:
    until(lambda: control.status(run).status == "finished", "the run did not end", processes)
    return str(control.status(run).sub_status)


@pytest.mark.slow
@pytest.mark.federation
def test_a_site_trains_again_after_a_kill_and_after_a_stop(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    datasets = {"site-a": str(record(tmp_path / "a", (30, 35, 40)))}
    runs = tmp_path / "runs"
    with federation(tmp_path / "federation", datasets, runs, free_port()) as (control, processes):
        trainer = Trainer(processes.logs / "superexec-site-a.log")

        run = control.start(run_request(ROOT, [KILLED]))
        until(trainer.steps, "training did not begin", processes)
        before = trainer.pid()
        assert "trainer" not in (processes.logs / "superexec-superlink.log").read_text()
        os.kill(before, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: "train: The trainer ended" in trainer.log.read_text(), "silence", processes)
        assert time.monotonic() - killed < 10
        # It goes on to its last round; one of two was not committed, and that is how it ends.
        assert finished(control, run, processes) == "failed"
        _, one, two = read_rounds(runs / str(run))
        told = one["sites"]["site-a"]["train"]
        assert told["state"] == "error"
        assert "ended in mid-job (killed by signal 9, SIGKILL" in told["reason"]
        assert two["sites"]["site-a"]["train"]["state"] == "completed"
        assert two["committed"]
        after = trainer.pid()
        assert after != before

        run = control.start(run_request(ROOT, [STOPPED]))
        until(trainer.steps, "training did not begin", processes)
        control.stop(run)
        until(lambda: trainer.jobs("cancelled"), "the job was not cancelled", processes)
        run = control.start(run_request(ROOT, [AFTER]))
        assert finished(control, run, processes) == "completed"
        # The same process: what it has loaded is worth keeping.
        assert trainer.pid() == after
