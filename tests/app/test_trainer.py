"""The resident trainer as a real process, with a stand-in for the worker: what it does, survives and refuses."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import payload as payloads
from app import trainer_client, trainer_wire
from app.job import Answer, Job
from app.payload import Payload, PayloadError
from app.supervisor import how, supervised
from app.trainer import Trainer
from app.trainer_client import submit
from certs.errors import DatasetError, FleetError, RunFailedError, StorageError
from tests.conftest import Vlafleet
from tests.trainer_standin import StandIn

STANDIN = (sys.executable, "-P", str(Path(__file__).parents[1] / "trainer_standin.py"))
# What a wait for another process may take on a loaded machine; none of it passes when all is well.
LONG = 60.0


@pytest.fixture(scope="module")
def trainer() -> Iterator[Path]:
    """The socket of a supervised trainer; several tests use one, each must leave it in order."""
    with running() as path:
        yield path


@pytest.fixture(autouse=True)
def _reached(trainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAFLEET_TRAINER", str(trainer))


@contextlib.contextmanager
def running(*command: str) -> Iterator[Path]:
    """The socket of a supervised trainer, where this process's jobs go meanwhile."""
    supervisor = supervised(command or STANDIN, without="VLAFLEET_IDENTITY")
    with supervisor as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLEET_TRAINER", str(path))
        yield path


def job(do: str, payload: Payload | None = None, **request: Any) -> Job:
    return Job("train", {"site": "site-a", "gpus": 1, "big": False}, {"do": do, **request}, payload)


def model(values: int = 64) -> Payload:
    tensors = [("a", np.arange(values, dtype=np.float32)), ("b", np.ones((2, 3), np.float32))]
    return payloads.pack(
        tensors, kind="model", codec="fp32", base=None, target="0" * 64, frozen="1" * 64
    )


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def pid_of(path: Path) -> int:
    """The process that does jobs behind this socket, which must be the newest."""
    assert os.environ["VLAFLEET_TRAINER"] == str(path)
    return int(submit(job("echo")).metrics["who"]["pid"])


def number(path: Path, name: str) -> float:
    """A metric of the trainer without labels."""
    found = re.search(rf"^vlafleet_trainer_{name} (\S+)$", trainer_client.metrics(path), re.M)
    assert found, name
    return float(found[1])


def frame(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text


class Begun:
    """A job that waits, in a thread of its own; entered once it runs."""

    def __init__(self, directory: Path, name: str = "a", do: str = "wait") -> None:
        self.go, self.cancelled = directory / f"go-{name}", directory / f"cancelled-{name}"
        self.begun = directory / f"begun-{name}"
        self.answer: Answer | FleetError | None = None
        self._job = job(do, begun=str(self.begun), go=str(self.go), cancelled=str(self.cancelled))
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.answer = submit(self._job)
        except FleetError as error:
            self.answer = error

    def start(self) -> "Begun":
        self.thread.start()
        return self

    def ended(self) -> Answer | FleetError:
        self.thread.join(LONG)
        assert self.answer is not None
        return self.answer


@contextlib.contextmanager
def raw(path: Path) -> Iterator[socket.socket]:
    """A connection that the trainer has greeted."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(LONG)
        connection.connect(str(path))
        assert "pid" in trainer_wire.receive(connection)[0]
        yield connection


def test_one_process_does_job_after_job(trainer: Path) -> None:
    first, second, third = (submit(job("echo")).metrics["who"] for _ in range(3))
    assert first["pid"] == second["pid"] == third["pid"] != os.getpid()
    assert third["jobs"] == second["jobs"] + 1 == first["jobs"] + 2


def test_what_is_said_arrives_as_it_was(trainer: Path) -> None:
    request = {
        "text": "ä\n", "number": 0.1, "whole": 3, "truth": True, "numbers": [1.5, 2.0], "none": [],
    }  # fmt: skip
    answer = submit(job("echo", model(), **request))
    assert answer.configs["request"] == {"do": "echo", **request}
    assert type(answer.configs["request"]["whole"]) is int
    assert answer.configs["node"] == {"site": "site-a", "gpus": 1, "big": False}
    assert answer.payload is not None
    assert answer.payload.manifest() == model().manifest()
    assert answer.payload.flat() == model().flat()
    np.testing.assert_array_equal(answer.payload.tensor("a"), np.arange(64, dtype=np.float32))


def test_a_payload_without_bytes_and_one_of_a_whole_model(trainer: Path) -> None:
    held = payloads.pack(
        [], kind="model", codec="fp32", base="0" * 64, target="0" * 64, frozen="1" * 64
    )
    answer = submit(job("echo", held))
    assert answer.payload is not None
    assert (answer.payload.nbytes, answer.payload.form) == (0, "held")
    # The trainable tensors of SmolVLA in int8.
    large = model(25_000_000)
    answer = submit(job("echo", large))
    assert answer.payload is not None
    assert hashlib.sha256(answer.payload.flat()).hexdigest() == large.sha256


def test_failures_come_back_as_they_were_and_the_trainer_stays(trainer: Path) -> None:
    before = pid_of(trainer)
    with pytest.raises(DatasetError, match=r"^The dataset is empty\.$"):
        submit(job("dataset"))
    with pytest.raises(PayloadError, match="not finite") as caught:
        submit(job("payload"))
    assert caught.value.reason == "finite"
    with pytest.raises(RunFailedError, match=r"ZeroDivisionError: division by zero\)") as failed:
        submit(job("crash"))
    assert "\n" not in str(failed.value)
    with pytest.raises(RunFailedError, match="cannot be said in JSON"):
        submit(job("unsayable"))
    assert pid_of(trainer) == before


def test_a_process_whose_gpu_failed_is_replaced(trainer: Path) -> None:
    """Its CUDA context would fail every job after it."""
    import torch

    assert issubclass(torch.AcceleratorError, RuntimeError)
    assert not issubclass(torch.OutOfMemoryError, torch.AcceleratorError)
    before = pid_of(trainer)
    with pytest.raises(RunFailedError, match="AcceleratorError: CUDA error"):
        submit(job("broken"))
    assert pid_of(trainer) != before


def test_a_trainer_killed_in_mid_job(trainer: Path, tmp_path: Path) -> None:
    """The reason comes within 10 s, and who comes next is served by a new one."""
    before = pid_of(trainer)
    waiting = Begun(tmp_path).start()
    until(waiting.begun.exists, "the job did not begin")
    killed = time.monotonic()
    os.kill(before, signal.SIGKILL)
    answer = waiting.ended()
    assert time.monotonic() - killed < 10
    assert isinstance(answer, RunFailedError)
    assert "ended in mid-job (killed by signal 9, SIGKILL" in str(answer)
    assert pid_of(trainer) not in {before, os.getpid()}


def test_a_client_that_goes_away_ends_its_job(trainer: Path, tmp_path: Path) -> None:
    """As a ClientApp does that is stopped: the kernel closes its socket."""
    before = pid_of(trainer)
    begun, cancelled = tmp_path / "begun", tmp_path / "cancelled"
    request = {"do": "wait", "begun": str(begun), "go": "/nowhere", "cancelled": str(cancelled)}
    code = f"from app.job import Job; from app.trainer_client import submit; submit(Job('train', {{}}, {request!r}))"
    client = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until(begun.exists, "the job did not begin")
    client.kill()
    client.wait()
    until(cancelled.exists, "the job was not cancelled")
    assert pid_of(trainer) == before
    assert 'jobs_total{kind="train",result="cancelled"} 1' in trainer_client.metrics(trainer)


def test_jobs_wait_in_turn_and_no_more_than_two(trainer: Path, tmp_path: Path) -> None:
    begun = []
    for name, waiting in (("a", 0), ("b", 1), ("c", 2)):
        begun.append(Begun(tmp_path, name).start())
        until(lambda: number(trainer, "busy") == 1, "no job runs")
        until(lambda n=waiting: number(trainer, "jobs_waiting") == n, "a job does not wait")  # type: ignore[misc]
    with pytest.raises(RunFailedError, match="works on a job and 2 wait already"):
        submit(job("echo"))
    assert [b.begun.exists() for b in begun] == [True, False, False]
    for one in begun:
        one.go.touch()
    answers = [one.ended() for one in begun]
    assert all(isinstance(answer, Answer) for answer in answers), answers
    assert submit(job("echo"))


def test_a_job_that_waits_is_dropped_with_its_client(trainer: Path, tmp_path: Path) -> None:
    first = Begun(tmp_path, "a").start()
    until(first.begun.exists, "the job did not begin")
    with raw(trainer) as connection:
        request = {"do": "wait", "begun": str(tmp_path / "never"), "go": "", "cancelled": ""}
        trainer_wire.send(connection, {"job": {"kind": "train", "node": {}, "request": request}})
        until(lambda: number(trainer, "jobs_waiting") == 1, "the job does not wait")
    first.go.touch()
    assert isinstance(first.ended(), Answer)
    assert submit(job("echo"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (struct.pack(">I", 1 << 31), "announces 2147483648 bytes"),
        (struct.pack(">I", 3) + b"{!}", "not the JSON object"),
        (struct.pack(">I", 2) + b"[]", "not the JSON object"),
        (struct.pack(">I", 2) + b"{}", "not the JSON object"),
        (frame({"payload": None}), "neither a job nor"),
        (frame({"payload": None, "job": {"kind": "rm", "node": {}, "request": {}}}), "neither a job"),
        (frame({"payload": None, "job": {"kind": "train", "node": []}}), "neither a job nor"),
        (frame({"payload": {}, "job": {}}), "manifest"),
        (frame({"payload": model().manifest(), "job": {}}), "and 0 came"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_by_name(trainer: Path, data: bytes, why: str) -> None:
    before = pid_of(trainer)
    with raw(trainer) as connection:
        connection.sendall(data)
        said, _ = trainer_wire.receive(connection)
    assert why in said["error"]["sentence"]
    assert pid_of(trainer) == before


@pytest.mark.parametrize("case", ["file", "unsealed", "short", "two"])
def test_only_sealed_bytes_are_mapped(trainer: Path, tmp_path: Path, case: str) -> None:
    """What could be changed or cut while it is read would end the trainer by a signal."""
    data, manifest = model().flat(), model().manifest()
    if case == "file":
        (tmp_path / "file").write_bytes(data)
        descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    else:
        descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.write(descriptor, data[:-4] if case == "short" else data)
        if case == "short":
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, trainer_wire._SEALS)
    text = frame({"payload": manifest, "job": {"kind": "train", "node": {}, "request": {}}})
    with raw(trainer) as connection:
        socket.send_fds(connection, [text], [descriptor] * (2 if case == "two" else 1))
        said, _ = trainer_wire.receive(connection)
    os.close(descriptor)
    why = {"short": "announces", "two": "more than one file"}.get(case, "not sealed")
    assert why in said["error"]["sentence"]
    assert submit(job("echo"))


def test_only_its_user_reaches_the_socket(trainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stat.S_IMODE(trainer.stat().st_mode) == 0o600
    assert stat.S_IMODE(trainer.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(trainer_client, "same_user", lambda _: False)
    with pytest.raises(RunFailedError, match="another user"):
        submit(job("echo"))


def test_a_peer_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the kernel says of the other end; the trainer is a thread here, so that it can be told another."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert trainer_wire.same_user(ours)
        monkeypatch.setattr("os.getuid", lambda: 12345)
        assert not trainer_wire.same_user(ours)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        threading.Thread(target=Trainer(StandIn()).serve, args=(listener,), daemon=True).start()
        monkeypatch.setattr(trainer_client, "same_user", lambda _: True)
        monkeypatch.setenv("VLAFLEET_TRAINER", str(tmp_path / "s"))
        with pytest.raises(RunFailedError, match="closed the connection before it began"):
            submit(job("echo"))


def test_metrics_say_what_it_does(trainer: Path, vlafleet: Vlafleet) -> None:
    submit(job("echo"))
    assert number(trainer, "step") == 3
    assert number(trainer, "loss") == 0.5
    assert number(trainer, "samples_per_second") == 8
    # This job said nothing of it.
    assert math.isnan(number(trainer, "steps"))
    assert number(trainer, "gpu_memory_bytes") == 0
    assert number(trainer, "process_resident_memory_bytes") > 1e7
    text = vlafleet("trainer", trainer).stdout
    assert 'vlafleet_trainer_cache_info{tier="memory"} 1' in text
    assert 'vlafleet_trainer_job_seconds_count{kind="train"}' in text
    assert {
        line.split("{")[0].split(" ")[0].startswith("vlafleet_trainer_")
        for line in text.splitlines()
        if not line.startswith("#")
    } == {True}


def test_metrics_of_a_trainer_that_is_not_there(tmp_path: Path, vlafleet: Vlafleet) -> None:
    refused = vlafleet("trainer", tmp_path / "s")
    assert refused.returncode == 16
    assert "cannot be reached" in refused.stderr
    with socket.socket(socket.AF_UNIX) as listener, pytest.MonkeyPatch.context() as patch:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        patch.setattr(trainer_client, "_METRICS_S", 0.1)
        with pytest.raises(RunFailedError, match="does not answer"):
            trainer_client.metrics(tmp_path / "s")


def test_the_kernel_takes_the_trainer_first_and_it_has_no_identity() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLAFLEET_IDENTITY", "/identity")
        with running() as path:
            process = Path("/proc", str(pid_of(path)))
            assert int((process / "oom_score_adj").read_text()) == 500
            assert b"VLAFLEET_IDENTITY" not in (process / "environ").read_bytes()


def test_a_trainer_that_does_not_start_says_how_it_ended() -> None:
    expected = pytest.raises(RunFailedError, match=r"does not start \(exit code 3\)")
    with running(sys.executable, "-c", "raise SystemExit(3)"), expected:
        submit(job("echo"))
    with (
        running("/nowhere/trainer"),
        pytest.raises(RunFailedError, match=r"does not start \(it cannot"),
    ):
        submit(job("echo"))


def test_a_job_is_given_up_when_its_round_is_over(
    trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_client, "_MARGIN_S", 0.5)
    paths: dict[str, Any] = {name: str(tmp_path / name) for name in ("begun", "go", "cancelled")}
    late = job("wait", config=json.dumps({"round-timeout": 0.5}), **paths)
    with pytest.raises(RunFailedError, match="before the round's deadline"):
        submit(late)
    until((tmp_path / "cancelled").exists, "the job was not cancelled")


def test_a_cancelled_job_that_does_not_notice_costs_the_trainer(tmp_path: Path) -> None:
    """Else the site would be lost for every later round; a job that waits behind it is done by the next trainer."""
    with running(*STANDIN, "0.2") as path:
        before, begun = pid_of(path), tmp_path / "begun"
        with raw(path) as connection:
            request = {"do": "sleep", "begun": str(begun)}
            trainer_wire.send(
                connection, {"job": {"kind": "train", "node": {}, "request": request}}
            )
            until(begun.exists, "the job did not begin")
        assert pid_of(path) != before


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    with running() as path:
        pid = pid_of(path)
        submit(job("echo", mark=str(tmp_path / "closed")))
    assert not Path("/proc", str(pid)).exists()
    # It finished what it was writing before it went.
    assert (tmp_path / "closed").exists()
    assert not path.parent.exists()
    with pytest.raises(RunFailedError, match="cannot be reached"):
        trainer_client.metrics(path)


def test_it_ends_with_its_superexec() -> None:
    """Even where that is killed: the kernel sees to it."""
    code = f"""
import os, time
from app.supervisor import supervised
from app.job import Job
from app.trainer_client import submit
with supervised({STANDIN!r}) as path:
    os.environ["VLAFLEET_TRAINER"] = str(path)
    print(path, submit(Job("train", {{}}, {{"do": "echo"}})).metrics["who"]["pid"], flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        path, pid = parent.stdout.readline().split()
        parent.kill()
    # What nobody could clean up any more.
    shutil.rmtree(Path(path).parent)
    until(lambda: not Path("/proc", pid).exists(), "the trainer outlived its SuperExec")


def test_a_socket_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's bound for a socket's path is 107 bytes."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(StorageError, match="let TMPDIR name"), supervised(STANDIN):
        pass
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (-11, "killed by signal 11, SIGSEGV"), (-9, "when memory runs out")],
)
def test_how_a_process_ended(code: int, words: str) -> None:
    assert words in how(code)
