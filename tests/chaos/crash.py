"""A ServerApp that is killed at its n-th step, and resumed: run by ``test_resume.py`` as a process of its own.

Its sites keep their state on disk as real ones do (``app.site_state``) and answer in no particular order; what they
"train" is arithmetic on the model, so that a run takes a second. Steps are all calls that reach the disk or the
SuperLink: between two of them a crash leaves the same behind.
"""

import json
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from app import exchange, payload, server_app, statistics, tensorfile
from app.config import RunConfig, home
from app.description import Description
from app.exchange import Exchange
from app.job import WANT_FULL
from app.journal import read_config, read_rounds, runs_root
from app.policy import trainable_names
from app.rounds import Round
from app.site_state import Kept, SiteState
from certs.errors import RunFailedError

SITES = ("site-a", "site-b", "site-c")
NOWHERE = (-1, 0)
# Three rounds: one to begin with, one that fails at every site, one that goes on from there.
ROUNDS, FAILS = 3, 2
CONFIG: dict[str, Any] = {
    "rounds": ROUNDS,
    "codec": "int8",
    "strategy": "fedavgm",
    "server-momentum": 0.5,
    "min-sites": 3,
    "round-timeout": 60.0,
}


@dataclass
class Steps:
    """Counts the steps of each phase and ends the process at one of them, as a power cut would."""

    # The phase, by its number in the run, and the step within it; (-1, 0) kills nowhere.
    last: tuple[int, int]
    phase: str = "start"
    # The steps taken in each phase so far.
    done: list[int] = field(default_factory=lambda: [0])
    # The sites live in this process and are not the ones that die.
    paused: bool = False

    def step(self) -> None:
        if self.paused:
            return
        self.done[-1] += 1
        if (len(self.done) - 1, self.done[-1]) == self.last:
            os.write(1, f"killed in {self.phase}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def before[**P, T](self, call: Callable[P, T]) -> Callable[P, T]:
        def counted(*args: P.args, **options: P.kwargs) -> T:
            self.step()
            return call(*args, **options)

        return counted

    def watch(self) -> None:
        # A killed process loses nothing of what it wrote: syncing would only cost time, as would
        # the reports that a run ends with.
        os.fsync = lambda _: None  # type: ignore[assignment]
        for name in ("write_report", "write_model_card"):
            setattr(server_app, name, lambda directory: directory)
        for owner, names in (
            (os, ("fsync", "truncate")),
            # "replace": each phase begins with it, and so each has a step.
            (Path, ("rename", "replace", "symlink_to", "unlink")),
        ):
            for name in names:
                setattr(owner, name, self.before(getattr(owner, name)))
        enter = Round.enter

        def entered(state: Round, phase: Any) -> None:
            self.phase = phase.value
            self.done.append(0)
            enter(state, phase)

        setattr(Round, "enter", entered)  # noqa: B010 - a plain assignment has another type


@dataclass
class Site:
    """A site without torch: its update pulls every value towards a number of its own."""

    name: str
    base: Path

    def answer(self, message: Message) -> Message:
        request = message.content.config_records["request"]
        state = SiteState(home() / "sites" / self.name, str(request["lineage"]))
        own = tensorfile.read(self.base / "model.safetensors", trainable_names(self.base))
        kind = message.metadata.message_type
        if kind == "query":
            count, mean = 100, np.full(6, float(SITES.index(self.name)))
            part = statistics.Moments(count, mean, np.full(6, 25.0 * count))
            described = Description(
                site=self.name, dataset="d", train_episodes=4, held_out_episodes=1, train_frames=100,
                held_out_frames=25, fps=30, cameras=("top",), tasks=("Pick.",),
                moments={"observation.state": part, "action": part},
                held=state.held() or payload.canonical_hash(own), chunk_bytes=0,
            )  # fmt: skip
            return Message(described.to_records(), reply_to=message)
        model = payload.from_records(message.content, kind="model")
        held = dict(state.model()) if state.held() else own
        if model.base not in (None, payload.canonical_hash(held)):
            return Message(WANT_FULL.to_records(), reply_to=message)
        tensors = dict(payload.apply(held, model))
        assert payload.canonical_hash(tensors) == model.target
        shapes = {name: array.shape for name, array in tensors.items()}
        state.keep_model(str(model.target), shapes, tensors.items())
        if kind == "evaluate":
            loss = float(
                np.mean([np.abs(array).mean(dtype=np.float64) for array in tensors.values()])
            )
            metrics = MetricRecord({"loss": loss, "frames": 25, "rmse_deg": [loss] * 6})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        number = int(request["round"])  # type: ignore[arg-type]
        if number == FAILS:
            return Message(Error(2, "The disk is full."), reply_to=message)
        kept = state.before(number)
        residual, parts = {}, []
        draw = np.random.default_rng([number, SITES.index(self.name)])
        for name, array in sorted(tensors.items()):
            noise = draw.standard_normal(array.shape, np.float32)
            delta = np.float32(0.05) * (noise - array)
            before = kept.residual[name] if kept and kept.residual else None
            encoded, _, residual[name] = payload.encode_feedback(delta, before, "int8")
            parts.append((name, array.shape, encoded))
        update = payload.pack_encoded(
            parts, kind="update", codec="int8", base=model.target, target=None, frozen=model.frozen
        )
        state.keep(number, Kept(None, residual))
        records = payload.to_records(update)
        frames = 100 + 10 * SITES.index(self.name)
        records["metrics"] = MetricRecord({"loss": 1.0, "frames": frames, "grad_norm": 1.0})
        return Message(records, reply_to=message)


@dataclass
class Node:
    node_id: int
    name: str


@dataclass
class Grid:
    """Flower's Grid over these sites; replies are there at once, or at the second look."""

    sites: dict[int, Site]
    steps: Steps
    replies: dict[str, Message] = field(default_factory=dict)
    late: random.Random = field(default_factory=random.Random)

    def get_nodes(self) -> list[Node]:
        self.steps.step()
        return [Node(node, site.name) for node, site in self.sites.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.steps.step()
        ids = []
        for message in messages:
            ids.append(f"m{len(self.replies)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.steps.paused = True
            self.replies[ids[-1]] = self.sites[message.metadata.dst_node_id].answer(message)
            self.steps.paused = False
        self.steps.step()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.steps.step()
        return [self.replies[key] for key in message_ids if self.late.random() < 0.5]


def run(base: Path, number: int, *, kill: tuple[int, int], resume: bool) -> list[int]:
    """One ServerApp process; how many steps it took in each of its phases."""
    steps = Steps(kill)
    sites = {n: Site(name, base) for n, name in enumerate(SITES, start=1)}
    config = {**RunConfig().as_dict(), "model": str(base)}
    config |= {"resume": True} if resume else CONFIG
    context = Context(number, 0, {}, RecordDict(), config)
    steps.watch()
    try:
        server_app.main(Grid(sites, steps), context)  # type: ignore[arg-type]
    except RunFailedError as error:
        # One round of the three fails, whatever happens beside.
        if "2 of 3 rounds were committed" not in str(error):
            raise
    return steps.done


def in_child(call: Callable[[], list[int]]) -> tuple[int, str]:
    """The exit status of ``call`` in a forked process, and what it wrote."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        try:
            os.write(1, (" ".join(map(str, call())) + "\n").encode())
        except BaseException:
            logging.exception("the ServerApp failed")
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as output:
        said = output.read()
    return os.waitpid(child, 0)[1], said


def outcome() -> dict[str, Any]:
    """What a finished run must not owe to a crash: its models, its losses, its sites' ends."""
    directory = runs_root() / "latest"
    records = read_rounds(directory)
    return {
        "models": [record["model"] for record in records],
        "losses": [record["aggregate"]["loss"] for record in records],
        "committed": [record["committed"] for record in records],
        "states": [
            {name: (site["train"] or {}).get("state") for name, site in record["sites"].items()}
            for record in records
        ],
        "frames": [record["aggregate"]["frames"] for record in records],
        "statistics": read_config(directory)["statistics"],
        "best": os.readlink(directory / "checkpoints" / "best"),
        "latest": os.readlink(directory / "checkpoints" / "latest"),
        "checkpoints": sorted(path.name for path in (directory / "checkpoints").glob("[!.]*")),
    }


def main(base: Path, work: Path, stride: int) -> None:
    """Print the uninterrupted outcome, then that of runs killed at every ``stride``-th step of each phase."""
    for name in ("_task_id", "_run_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # Nobody is spared here by looking rarely.
    exchange.LOOKS = 10_000
    assert Exchange.__init__.__kwdefaults__
    Exchange.__init__.__kwdefaults__["poll_s"] = 0.01

    def fresh(name: str) -> None:
        os.environ["VLAFLEET_RUNS"] = str(work / name / "runs")
        os.environ["VLAFLEET_HOME"] = str(work / name / "home")

    fresh("whole")
    status, said = in_child(partial(run, base, 1, kill=NOWHERE, resume=False))
    assert status == 0, said
    steps = [int(count) for count in said.split()]
    print(json.dumps({"kill": None, "steps": steps, "outcome": outcome()}), flush=True)
    for kill in [(n, k) for n, count in enumerate(steps) for k in range(1, count + 1, stride)]:
        fresh("kill-{}-{}".format(*kill))
        status, said = in_child(partial(run, base, 1, kill=kill, resume=False))
        # Replies come in no order: a phase may take a few steps fewer than in the first run.
        killed = said.strip() if os.WIFSIGNALED(status) else None
        if killed:
            # The kill may have hit before the run had a record to resume, or when it was all over.
            about = runs_root() / "latest" / "config.json"
            started = about.exists()
            status = 0
            if not started or not read_config(about.parent)["ended"]:
                status, said = in_child(partial(run, base, 2, kill=NOWHERE, resume=started))
        assert status == 0, (kill, killed, said)
        print(json.dumps({"kill": kill, "killed": killed, "outcome": outcome()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
