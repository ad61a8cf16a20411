"""A worker over many jobs: what it keeps changes nothing but the time they take."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import frames, payload, policy, prefix_build, prefix_cache, resident, tensorfile
from app.config import RunConfig
from app.config import home as directory
from app.job import METRICS, WANT_FULL, Answer, Job, Kind
from app.payload import Payload
from app.policy import frozen_hash, trainable_names
from app.prefix_build import PrefixBuild
from app.site_state import SiteState
from app.tensorfile import WEIGHTS
from app.worker import Worker
from certs.errors import DatasetError, RunFailedError, StorageError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))


@pytest.fixture
def worker() -> Iterator[Worker]:
    with closing(Worker()) as one:
        yield one


def unwatched(**_: float | int | str) -> None:
    """Progress that nobody follows."""


@dataclass
class Run:
    """A run of one site as its server leads it: each round's model is the last one and the site's update."""

    base: Path
    dataset: Path
    site: str = "site-a"
    lineage: str = "17"
    settings: dict[str, Any] = field(default_factory=dict)
    node: dict[str, Any] = field(default_factory=dict)
    statistics: str = ""

    def __post_init__(self) -> None:
        small = {"rounds": 3, "local_steps": 2, "batch_size": 4, "eval_batches": 1}
        self.config = RunConfig(model=str(self.base), **{**small, **self.settings})
        self.tensors = tensorfile.read(self.base / WEIGHTS, trainable_names(self.base))
        self.before = ""

    def job(self, kind: Kind, number: int = 0, model: Payload | None = None) -> Job:
        told = {"round": number, "statistics": self.statistics, "scale": 1.0, "mu": 0.0}
        request = {"lineage": self.lineage, "config": json.dumps(self.config.as_dict()), **told}
        node = {"site": self.site, "dataset": str(self.dataset), "device": "cpu", **self.node}
        return Job(kind, node, request, model)

    def describe(self, worker: Worker) -> dict[str, Any]:
        described = dict(worker.handle(self.job("describe"), unwatched).configs["description"])
        self.statistics = described["moments"]
        return described

    def model(self, **manifest: Any) -> Payload:
        """The round's model, which the site holds."""
        own = payload.canonical_hash(self.tensors)
        known = {"base": own, "target": own, "frozen": frozen_hash(self.base), **manifest}
        return payload.pack((), kind="model", codec="fp32", **known)

    def train(self, worker: Worker, number: int, progress: Any = unwatched) -> Answer:
        return worker.handle(self.job("train", number, self.model()), progress)

    def apply(self, answer: Answer) -> Payload:
        """Take the site's update for the next model; the change that leads there."""
        update = answer.payload
        assert update
        before = payload.canonical_hash(self.tensors)
        self.tensors = {name: self.tensors[name] + change for name, change in update.items()}
        after = payload.canonical_hash(self.tensors)
        return payload.pack(
            update.items(), kind="model", codec=self.config.codec, base=before, target=after,
            frozen=update.frozen,
        )  # fmt: skip

    def evaluate(self, worker: Worker, number: int, model: Payload | None = None) -> dict[str, Any]:
        job = self.job("evaluate", number, model or self.model())
        return dict(worker.handle(job, unwatched).metrics[METRICS])

    def round(self, worker: Worker, number: int) -> tuple[str, float]:
        """The update's checksum, and the loss of the model it leads to."""
        answer = self.train(worker, number)
        assert answer.payload
        return answer.payload.sha256, self.evaluate(worker, number, self.apply(answer))["loss"]

    def rounds(self, workers: Callable[[], Worker], last: int = 3) -> list[tuple[str, float]]:
        """All rounds; each message goes to the worker that ``workers`` names then."""
        self.describe(workers())
        return [self.round(workers(), number) for number in range(1, last + 1)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a worker did what takes long."""
    calls: dict[str, int] = {}

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    for owner, name in (
        (policy, "load_policy"),
        (resident, "Frames"),
        (resident, "frozen_hash"),
        (prefix_cache.PrefixCache, "open"),
        (frames.Frames, "decode"),
    ):
        count(owner, name)
    return calls


def test_rounds_and_runs_load_policy_frames_and_prefixes_once(
    worker: Worker, counted: dict[str, int], tiny_base: Path, tiny_dataset: Path
) -> None:
    Run(tiny_base, tiny_dataset).rounds(lambda: worker)
    once = {"load_policy": 1, "Frames": 2, "frozen_hash": 1, "open": 2, "decode": 2}
    assert counted == once
    Run(tiny_base, tiny_dataset, lineage="18").rounds(lambda: worker)
    assert counted == once


def test_what_is_kept_changes_no_bit(worker: Worker, tiny_base: Path, tiny_dataset: Path) -> None:
    kept = Run(tiny_base, tiny_dataset, "site-a").rounds(lambda: worker)
    # Each message in a process of its own, as far as a process is what a worker keeps.
    alone = Run(tiny_base, tiny_dataset, "site-b").rounds(Fresh())
    assert kept == alone
    assert len({checksum for checksum, _ in kept}) == 3


class Fresh:
    """A new worker for each message; the one before has written what it keeps."""

    last: Worker | None = None

    def __call__(self) -> Worker:
        if self.last:
            self.last.close()
        self.last = Worker()
        return self.last


def test_two_processes_that_take_turns_with_a_site_agree(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    expected = Run(tiny_base, tiny_dataset, lineage="17").rounds(lambda: worker)
    run = Run(tiny_base, tiny_dataset, lineage="18")
    with closing(Worker()) as first, closing(Worker()) as second:
        run.describe(first)
        found = []
        # The first has round 1's moments in memory when round 3 comes, and the disk has round 2's.
        for number, one in ((1, first), (2, second), (3, first)):
            found.append(run.round(one, number))
            # As the simulation does, in which this is so.
            one._resident.state(run.site, run.lineage)
    assert found == expected


def test_what_the_next_process_needs_is_on_disk_once_a_worker_has_settled(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(
        tiny_base, tiny_dataset, "site-0000", settings={"simulation_dataset": str(tiny_dataset)},
        node={"partition-id": 0, "num-partitions": 1},
    )  # fmt: skip
    run.describe(worker)
    run.train(worker, 1)
    worker.settle()
    assert SiteState(directory() / "sites" / "site-0000", "17").before(2)


def test_a_round_done_again_starts_where_it_started(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)
    first = run.train(worker, 1)
    change = run.apply(first)
    run.evaluate(worker, 1, change)
    second, again, third = (run.train(worker, number).payload for number in (2, 2, 3))
    assert second
    assert again
    assert third
    assert second.sha256 == again.sha256 != third.sha256


def test_an_evaluation_ends_itself_at_the_deadline(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(tiny_base, tiny_dataset, settings={"eval_batches": 2})
    run.describe(worker)
    run.evaluate(worker, 0)
    run.config = RunConfig(**{**vars(run.config), "round_timeout": 1e-6})
    with pytest.raises(RunFailedError, match="4 of 8 held-out frames"):
        run.evaluate(worker, 0)


class StopHereError(Exception):
    """What a cancelled job raises."""


def stop(**values: float | int | str) -> None:
    if "step" in values:
        raise StopHereError


def test_a_job_that_is_cancelled_in_mid_training_leaves_nothing_behind(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run, like = (Run(tiny_base, tiny_dataset, site) for site in ("site-a", "site-b"))
    run.describe(worker)
    before = run.evaluate(worker, 0)["loss"]
    with pytest.raises(StopHereError):
        run.train(worker, 1, stop)
    assert run.evaluate(worker, 0)["loss"] == before
    assert run.rounds(lambda: worker) == like.rounds(lambda: worker)


def test_an_answer_does_not_wait_for_the_disk_and_the_next_job_does(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, may_write = SiteState.keep, threading.Event()

    def slow(*arguments: Any) -> None:
        assert may_write.wait(60)
        keep(*arguments)

    monkeypatch.setattr(SiteState, "keep", slow)
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)
    assert run.train(worker, 1).payload
    state = directory() / "sites" / "site-a" / "17"
    assert not list(state.glob("optimizer-*"))
    later = threading.Timer(0.2, may_write.set)
    later.start()
    run.evaluate(worker, 1)
    assert may_write.is_set()
    assert list(state.glob("optimizer-*"))


def test_a_full_disk_fails_the_next_job_and_no_other(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensorfile, "write", full)
        run.train(worker, 1)
        with pytest.raises(StorageError, match="No space left"):
            run.train(worker, 2)
    assert run.train(worker, 2).payload


def test_a_dataset_that_changes_is_read_again(
    worker: Worker, counted: dict[str, int], tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy)
    run = Run(tiny_base, copy)
    run.describe(worker)
    before = run.evaluate(worker, 0)["loss"]
    (copy / "meta" / "info.json").touch()
    assert run.evaluate(worker, 0)["loss"] == before
    assert counted["Frames"] == 2
    shutil.rmtree(copy)
    with pytest.raises(DatasetError, match="does not exist"):
        run.evaluate(worker, 0)
    shutil.copytree(tiny_dataset, copy)
    assert run.evaluate(worker, 0)["loss"] == before


def test_another_base_takes_the_first_ones_place(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    first = Run(tiny_base, tiny_dataset)
    first.describe(worker)
    before = first.evaluate(worker, 0)["loss"]
    held = weakref.ref(
        worker._resident.model(first.config, worker._resident.base(first.config, "17"), "cpu")
    )
    other = tmp_path / "other"
    shutil.copytree(tiny_base.parent, other)
    second = Run(other / "base", tiny_dataset, lineage="18")
    moved = {name: array * np.float32(1.5) for name, array in second.tensors.items()}
    tensorfile.write(other / "base" / "new", moved, base=other / "base" / WEIGHTS)
    (other / "base" / "new").rename(other / "base" / WEIGHTS)
    second = Run(other / "base", tiny_dataset, lineage="18")
    second.describe(worker)
    assert second.evaluate(worker, 0)["loss"] != before
    gc.collect()
    assert held() is None
    assert first.evaluate(worker, 0)["loss"] == before


def test_many_simulated_sites_share_a_process_and_its_memory(
    worker: Worker,
    counted: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Path,
    tiny_dataset: Path,
) -> None:
    monkeypatch.setattr(resident, "_SITES", 2)
    runs = [Run(tiny_base, tiny_dataset, f"site-{letter}") for letter in "abc"]
    for run in (*runs, *runs):
        run.describe(worker)
        run.evaluate(worker, 0)
    assert counted["load_policy"] == 1
    # Of three sites that take turns in two places, none finds its own again.
    assert counted["open"] == 6
    runs[-1].evaluate(worker, 0)
    assert counted["open"] == 6


def test_a_model_that_is_not_held_is_asked_for(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)
    foreign = run.model(base="f" * 64, target="f" * 64)
    assert worker.handle(run.job("evaluate", 0, foreign), unwatched) is WANT_FULL


def test_progress_names_what_the_metrics_show(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)
    told: list[dict[str, Any]] = []
    run.train(worker, 1, lambda **values: told.append(values))
    last = told[-1]
    assert (last["step"], last["steps"], last["round"]) == (2, 2, 1)
    assert last["loss"] > 0
    assert last["samples_per_second"] > 0
    assert 0 <= last["data_wait"] <= 1
    assert "memory" in {values.get("cache_tier") for values in told}


def test_a_run_caches_only_the_frames_it_draws(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tiny_base, tiny_dataset, settings={"rounds": 1})
    run.describe(worker)
    run.train(worker, 1)
    ((_, build),) = worker._resident._sites["site-a"][1]._builds.values()
    cache = build.wait(lambda *_: None)
    # Two steps of four frames, all of them different within the first pass.
    assert len(cache._rows) == 8


class Gate:
    """A build that goes on when it is let, and counts how often it was begun."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = 0
        self.closed = False

    def __call__(self, told: prefix_build.Told) -> Any:
        self.begun += 1
        while not self.open.wait(0.01):
            told(7, 10)
        return self

    def close(self) -> None:
        self.closed = True


def test_a_cache_outlives_the_round_that_waited_for_it(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = Gate(), prefix_cache.PrefixCache.open

    def slow(*arguments: Any, progress: prefix_build.Told, **options: Any) -> Any:
        gate(progress)
        return real(*arguments, progress=progress, **options)

    monkeypatch.setattr(prefix_cache.PrefixCache, "open", slow)
    run = Run(tiny_base, tiny_dataset, settings={"round_timeout": 0.5})
    run.describe(worker)
    with pytest.raises(RunFailedError, match="7 of 10 frames"):
        run.train(worker, 1)
    gate.open.set()
    run.config = RunConfig(**{**vars(run.config), "round_timeout": 60.0})
    assert run.train(worker, 2).payload
    assert gate.begun == 1


def test_a_cache_that_nobody_wants_is_not_finished() -> None:
    gate = Gate()
    build = PrefixBuild(gate)
    with pytest.raises(StopHereError):
        build.wait(lambda *_: stop(step=1))
    build.close()
    assert build.failed
    assert not gate.closed


def test_a_cache_is_given_back() -> None:
    gate = Gate()
    build = PrefixBuild(gate)
    gate.open.set()
    assert build.wait(lambda *_: None) is gate  # type: ignore[comparison-overlap]
    build.close()
    assert gate.closed


def test_why_a_cache_cannot_be_built_is_said_each_time() -> None:
    def broken(_: prefix_build.Told) -> Any:
        raise DatasetError("The file is damaged.")

    build = PrefixBuild(broken)
    for _ in range(2):
        with pytest.raises(DatasetError, match="damaged"):
            build.wait(lambda *_: None)
    assert build.failed
    build.close()


def test_a_job_says_what_there_is_to_train_on(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    run = Run(tiny_base, tiny_dataset, settings={"held_out": 0.25})
    described = run.describe(worker)
    told: dict[str, Any] = {}
    run.train(worker, 1, lambda **values: told.update(values))
    counts = ("train_episodes", "train_frames", "held_out_episodes", "held_out_frames")
    assert {name: told[name] for name in counts} == {name: described[name] for name in counts}
    assert (told["train_episodes"], told["held_out_episodes"]) == (3, 1)


def test_a_jobs_lines_name_its_site_run_and_round(
    worker: Worker, tiny_base: Path, tiny_dataset: Path, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    run = Run(tiny_base, tiny_dataset)
    run.describe(worker)
    run.train(worker, 2)
    trained = len(lines())
    # What the trainer says of how the job ended is said after it.
    for _ in range(2):
        logging.getLogger("flwr").warning("after a job")
        Run(tiny_base, tiny_dataset, lineage="18").describe(worker)
    *work, ended, other = lines()
    assert "step 2/2" in work[-1]["message"]
    assert len(work) == trained > 0
    named = [(line["site"], line["run"], line["round"]) for line in (*work, ended)]
    assert named == [("site-a", "17", 2)] * (trained + 1)
    assert (other["site"], other["run"], other.get("round")) == ("site-a", "18", None)


def test_augmented_training_repeats_and_is_another(
    worker: Worker, tiny_base: Path, tiny_dataset: Path
) -> None:
    found = []
    for lineage, augmented in (("17", False), ("18", True), ("19", True)):
        settings = {"image_augmentation": augmented}
        run = Run(tiny_base, tiny_dataset, lineage=lineage, settings=settings)
        run.describe(worker)
        update = run.train(worker, 1).payload
        assert update
        found.append(update.sha256)
    assert found[0] != found[1] == found[2]


@pytest.mark.slow
def test_fifty_rounds_take_no_more_memory_than_ten(tiny_base: Path, tiny_dataset: Path) -> None:
    """In a process of its own, whose memory nothing else uses."""
    code = f"""
import gc
from pathlib import Path
from tests.app.test_worker import Run
from app.worker import Worker

def resident_kb():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

run, worker, sizes = Run(Path({str(tiny_base)!r}), Path({str(tiny_dataset)!r}), settings={{"rounds": 50}}), Worker(), []
run.describe(worker)
for number in range(1, 51):
    run.round(worker, number)
    sizes.append(resident_kb())
print(sizes[9], sizes[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tenth, last = map(int, done.stdout.split())
    assert last < 1.02 * tenth
