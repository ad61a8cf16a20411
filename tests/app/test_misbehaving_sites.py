"""A site misbehaves in one round of a run: the round ends in time and says why, and the run goes on.

Two sites are sound. The third is too, but for its answer to the second round's training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)

from app import payload, server_app, tensorfile
from app.config import RunConfig
from app.job import WANT_FULL
from app.journal import read_rounds, runs_root
from app.policy import trainable_names
from certs.errors import RunFailedError
from tests.app.test_server_app import FakeGrid, FakeSite, process

# The fixture works by being here.
__all__ = ["process"]

ROUNDS, BAD = 3, 2
# A deadline that no test may have to wait for.
FOREVER_S = 120.0
# A bound that only a wait without one, or for FOREVER_S, breaks.
SOON_S = 30.0
# Deadlines that tests wait for: long enough for sound sites, whose answers are there at once.
HARD_S, SOFT_S = 3.0, 2.0

type Fault = Callable[[Rogue, Message], Message | None]


def never(_: Rogue, __: Message) -> None:
    """No answer at all, as of a site whose machine hangs."""


def in_time(site: Rogue, message: Message) -> Message:
    return FakeSite.train(site, message)


def wants(_: Rogue, message: Message) -> Message:
    return Message(WANT_FULL.to_records(), reply_to=message)


def fails(code: int, reason: str) -> Fault:
    return lambda _, message: Message(Error(code, reason), reply_to=message)


@dataclass
class Rogue(FakeSite):
    """A sound site until its ``fault`` answers the bad round; ``ask`` is which message that is."""

    fault: Fault = in_time
    ask: str = "train"
    targets: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def answer(self, message: Message) -> Message | None:
        request = message.content.config_records["request"]
        kind, number = message.metadata.message_type, request.get("round", -1)
        if number == BAD and kind == "evaluate":
            self.over.set()
        if number == BAD and kind == self.ask:
            self.seen.append(kind)
            return self.fault(self, message)
        return super().answer(message)

    def read(self, message: Message) -> payload.Payload | None:
        model = super().read(message)
        assert model
        assert model.target
        self.targets.append(model.target)
        return model

    def sound(self, message: Message, step: float | None = None, **manifest: Any) -> RecordDict:
        """The records of a sound update, or of one with another step or manifest."""
        model = self.read(message)
        assert model
        return self.update(model, self.step if step is None else step, **manifest)


def sends(change: Callable[[Rogue, Message], RecordDict]) -> Fault:
    return lambda site, message: Message(change(site, message), reply_to=message)


def stale(site: Rogue, message: Message) -> RecordDict:
    first = site.targets[0]
    records = site.sound(message, base=first)
    assert first != site.targets[-1]
    return records


def flat(change: Callable[[bytearray], object]) -> Fault:
    """A sound update whose bytes ``change`` on the way."""

    def damaged(site: Rogue, message: Message) -> RecordDict:
        records = site.sound(message)
        data = bytearray(records.array_records["payload"]["flat"].data)
        change(data)
        array = Array("uint8", (len(data),), "raw", bytes(data))
        records["payload"] = ArrayRecord({"flat": array})
        return records

    return sends(damaged)


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 0x10


def as_if(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Fault:
    """An update of other tensors than the model's."""

    def changed(site: Rogue, message: Message) -> RecordDict:
        model = site.read(message)
        assert model
        held, site.held = site.held, change(site.held)
        records = site.update(model, site.step)
        site.held = held
        return records

    return sends(changed)


def reshaped(held: dict[str, Any]) -> dict[str, Any]:
    first = min(held)
    return {**held, first: np.zeros((3, *held[first].shape), np.float32)}


def fewer(held: dict[str, Any]) -> dict[str, Any]:
    return {name: held[name] for name in sorted(held)[1:]}


def reports(**metrics: Any) -> Fault:
    def changed(site: Rogue, message: Message) -> RecordDict:
        records = site.sound(message)
        records["metrics"] = MetricRecord({**records.metric_records["metrics"], **metrics})
        return records

    return sends(changed)


def manifest(text: str) -> Fault:
    def changed(site: Rogue, message: Message) -> RecordDict:
        records = site.sound(message)
        records["manifest"] = ConfigRecord({"json": text})
        return records

    return sends(changed)


# What answers at once: the fault, the site's state, and what its reason says.
CATALOGUE: dict[str, tuple[Fault, str, str]] = {
    "raises": (fails(2, "CUDA is out\nof memory."), "error", "CUDA is out of memory."),
    "lost its node": (fails(5, "Node Unavailable"), "offline", "Node Unavailable"),
    "NaN": (sends(lambda s, m: s.sound(m, float("nan"))), "invalid", "is not finite"),
    "infinity": (sends(lambda s, m: s.sound(m, float("-inf"))), "invalid", "is not finite"),
    "a huge step": (sends(lambda s, m: s.sound(m, 1e30)), "invalid", "beyond 1e18"),
    "beyond the norm": (sends(lambda s, m: s.sound(m, 1e9)), "invalid", "the norm-bound of 1e+06"),
    "a wrong shape": (as_if(reshaped), "invalid", "the model's has"),
    "a tensor less": (as_if(fewer), "invalid", "is missing"),
    "a stale base": (sends(stale), "invalid", "was made against model"),
    "another frozen part": (
        sends(lambda s, m: s.sound(m, frozen="0" * 64)), "invalid", "frozen"
    ),
    "a flipped bit": (flat(flip), "invalid", "do not have the checksum of their manifest"),
    "bytes cut off": (flat(lambda data: data.pop()), "invalid", "announces"),
    "no payload": (sends(lambda *_: RecordDict()), "invalid", "carries no payload"),
    "no manifest": (manifest("{"), "invalid", "The manifest is malformed"),
    "no frames": (reports(frames=0), "invalid", "claims 0 frames"),
    "too many frames": (reports(frames=10**12), "invalid", "claims 1000000000000 frames"),
    "a metric that is none": (reports(loss=[0.5]), "invalid", "reports loss as [0.5]"),
    "wants the model twice": (wants, "invalid", "asked for the model twice"),
    "a loss that is none": (reports(loss=float("nan")), "invalid", "reports loss as nan"),
    "a share above 1": (reports(data_wait=1.5), "invalid", "reports data_wait as 1.5"),
    "a negative count": (reports(trainer_restarts=-1), "invalid", "reports trainer_restarts as -1"),
}  # fmt: skip
# The same in a word, fit for counting.
CAUSES = {
    "raises": "unexpected",
    "lost its node": None,
    "NaN": "finite",
    "infinity": "finite",
    "a huge step": "finite",
    "beyond the norm": "norm",
    "a wrong shape": "shape",
    "a tensor less": "names",
    "a stale base": "base",
    "another frozen part": "frozen",
    "a flipped bit": "checksum",
    "bytes cut off": "size",
    "no payload": "missing",
    "no manifest": "schema",
    "no frames": "frames",
    "too many frames": "frames",
    "a metric that is none": "metrics",
    "wants the model twice": "unexpected",
    "a loss that is none": "finite",
    "a share above 1": "metrics",
    "a negative count": "metrics",
}


@dataclass
class LateGrid(FakeGrid):
    """Has site-c's update of the bad round only when that round's training is over.

    Until then there is nothing to pull, or the pull lasts (``uploads``).
    """

    uploads: bool = False
    handed_over: threading.Event = field(default_factory=threading.Event)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        (message_id,) = message_ids
        reply, rogue = self.replies[message_id], self.sites["site-c"]
        assert isinstance(rogue, Rogue)
        if reply and "late" in reply.content.config_records and not rogue.over.is_set():
            if not self.uploads:
                return []
            rogue.over.wait(FOREVER_S)
            self.handed_over.set()
        return [reply] if reply else []


def late(site: Rogue, message: Message) -> Message:
    records = site.sound(message)
    records["late"] = ConfigRecord({})
    return Message(records, reply_to=message)


def three(base: Path, fault: Fault, ask: str = "train") -> dict[str, FakeSite]:
    return {
        "site-a": FakeSite(base, step=0.5, frames=300),
        "site-b": FakeSite(base, step=-0.1, frames=100),
        "site-c": Rogue(base, step=0.2, frames=100, fault=fault, ask=ask),
    }


# How far a round moves each value: all three sites' mean by frames, and without site-c.
WHOLE, WITHOUT = 0.32, 0.35


def run(grid: FakeGrid, base: Path, **config: Any) -> list[dict[str, Any]]:
    """The records of a run of three rounds over ``grid``."""
    run_config = RunConfig(
        model=str(base), rounds=ROUNDS, codec="fp32", schedule="constant", min_sites=3, **config
    )
    context = Context(17, 0, {}, RecordDict(), run_config.as_dict())
    server_app.main(grid, context)  # type: ignore[arg-type]
    return read_rounds(runs_root() / "17")


def check(
    records: list[dict[str, Any]], base: Path, state: str, reason: str, *moves: float
) -> dict[str, Any]:
    """Every round is committed, the bad one without site-c; what is on record of site-c's fault."""
    assert [record["committed"] for record in records] == [True] * (ROUNDS + 1)
    before = tensorfile.read(base / "model.safetensors", trainable_names(base))
    for record, moved in zip(records, np.cumsum([0.0, *moves]), strict=True):
        directory = runs_root() / "17" / record["checkpoint"]
        after = tensorfile.read(directory / "model.safetensors", before)
        for name, values in before.items():
            assert np.isfinite(after[name]).all()
            np.testing.assert_allclose(after[name], values + moved, atol=1e-5)
    states = [record["sites"]["site-c"]["train"]["state"] for record in records[1:]]
    assert states == ["completed", state, "completed"]
    assert [record["degraded"] for record in records] == [False, False, True, False]
    bad = records[BAD]
    for name in ("site-a", "site-b"):
        assert bad["sites"][name]["train"]["state"] == "completed"
    assert bad["aggregate"]["frames"] == 400
    assert bad["aggregate"]["participation"] == pytest.approx(2 / 3)
    entry: dict[str, Any] = bad["sites"]["site-c"]["train"]
    assert reason in entry["reason"]
    assert "\n" not in entry["reason"]
    # Nothing of a reply that was not used is on record as if it had been.
    for measured in ("loss", "frames", "update_norm", "payload_sha256", "bytes_up"):
        assert entry[measured] is None
    return entry


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_fault_is_on_record_and_costs_the_round_nothing_but_the_site(
    name: str, tiny_base: Path
) -> None:
    fault, state, reason = CATALOGUE[name]
    grid = FakeGrid(three(tiny_base, fault))
    records = run(grid, tiny_base, round_timeout=FOREVER_S, norm_bound=1e6)
    entry = check(records, tiny_base, state, reason, WHOLE, WITHOUT, WHOLE)
    assert entry["cause"] == CAUSES[name]
    # It ended when the last site did, without a wait for the deadline.
    assert records[BAD]["seconds"]["collect"] < SOON_S
    # A site that failed in training is asked for the same round's evaluation, as the others are.
    assert records[BAD]["sites"]["site-c"]["evaluate"]["state"] == "completed"


@pytest.mark.parametrize(
    ("bounds", "state", "reason"),
    [
        ({"round_timeout": HARD_S}, "timeout", "no reply within 3 s"),
        (
            # Both sound sites are the quorum: the round waits for them however slow they are.
            {"round_timeout": FOREVER_S, "soft_deadline": SOFT_S, "quorum": 2},
            "late",
            "the round closed with 2 of 3 replies after its soft deadline of 2 s",
        ),
    ],
)
@pytest.mark.parametrize("answers", ["never", "late", "in the middle of an upload"])
def test_the_round_ends_by_its_deadline_without_a_site_that_does_not_answer_in_time(
    answers: str, bounds: dict[str, Any], state: str, reason: str, tiny_base: Path
) -> None:
    uploads = answers == "in the middle of an upload"
    sites = three(tiny_base, never if answers == "never" else late)
    grid = LateGrid(sites, uploads=uploads)
    records = run(grid, tiny_base, **bounds)
    if uploads:
        assert grid.handed_over.wait(SOON_S)
    entry = check(records, tiny_base, state, reason, WHOLE, WITHOUT, WHOLE)
    waited = bounds.get("soft_deadline", HARD_S)
    assert waited <= entry["seconds"] < waited + SOON_S
    assert records[BAD]["seconds"]["collect"] < waited + SOON_S


def test_the_first_sites_of_an_over_sampled_round_do_not_wait_for_the_last(
    tiny_base: Path,
) -> None:
    grid = FakeGrid(three(tiny_base, never))
    records = run(grid, tiny_base, round_timeout=FOREVER_S, sites_per_round=2, over_sampling=1.5)
    assert [record["committed"] for record in records] == [True] * (ROUNDS + 1)
    for record in records[1:]:
        states = [site["train"]["state"] for site in record["sites"].values()]
        assert sorted(states) == ["completed", "completed", "late"]
        assert record["seconds"]["collect"] < SOON_S
    late = records[BAD]["sites"]["site-c"]["train"]
    assert late["reason"] == "the round closed with the first 2 replies"


@pytest.mark.parametrize(
    ("fault", "state", "reason"),
    [
        (never, "timeout", "no reply within 3 s"),
        (fails(2, "The camera is gone."), "error", "The camera is gone."),
        (sends(lambda *_: RecordDict({"metrics": MetricRecord({"loss": 1})})), "invalid", "loss"),
        (wants, "invalid", "asked for the model twice"),
    ],
)
def test_an_evaluation_that_fails_leaves_the_model_and_the_run_as_they_are(
    fault: Fault, state: str, reason: str, tiny_base: Path
) -> None:
    grid = FakeGrid(three(tiny_base, fault, ask="evaluate"))
    records = run(grid, tiny_base, round_timeout=HARD_S if fault is never else FOREVER_S)
    assert [record["committed"] for record in records] == [True] * (ROUNDS + 1)
    assert not any(record["degraded"] for record in records)
    evaluations = [record["sites"]["site-c"]["evaluate"] for record in records]
    assert [e["state"] for e in evaluations] == ["completed", "completed", state, "completed"]
    assert reason in evaluations[BAD]["reason"]
    assert evaluations[BAD]["loss"] is None
    # The mean of those that answered, which the others' rounds do not compare with.
    assert records[BAD]["aggregate"]["loss"] is not None
    assert records[BAD]["seconds"]["evaluate"] < HARD_S + SOON_S


def test_a_round_in_which_every_site_misbehaves_fails_and_the_next_one_is_whole(
    tiny_base: Path,
) -> None:
    faults = [CATALOGUE[name][0] for name in ("raises", "NaN", "a flipped bit")]
    sites: dict[str, FakeSite] = {
        f"site-{letter}": Rogue(tiny_base, step=0.5, fault=fault)
        for letter, fault in zip("abc", faults, strict=True)
    }
    with pytest.raises(RunFailedError, match="2 of 3 rounds were committed"):
        run(FakeGrid(sites), tiny_base, round_timeout=FOREVER_S)
    records = read_rounds(runs_root() / "17")
    assert [record["committed"] for record in records] == [True, True, False, True]
    bad = [site["train"]["state"] for site in records[BAD]["sites"].values()]
    assert bad == ["error", "invalid", "invalid"]
    assert records[BAD]["model"] == records[BAD - 1]["model"] != records[BAD + 1]["model"]
    last = [site["train"]["state"] for site in records[-1]["sites"].values()]
    assert last == ["completed"] * 3


def test_a_round_below_its_quorum_fails_and_the_next_one_is_whole(tiny_base: Path) -> None:
    grid = FakeGrid(three(tiny_base, CATALOGUE["a stale base"][0]))
    with pytest.raises(RunFailedError, match="2 of 3 rounds were committed"):
        run(grid, tiny_base, round_timeout=FOREVER_S, quorum=3)
    records = read_rounds(runs_root() / "17")
    assert [record["committed"] for record in records] == [True, True, False, True]
    assert "2 valid updates where the quorum is 3" in records[BAD]["reason"]
    assert records[BAD]["model"] == records[BAD - 1]["model"]
    assert records[-1]["aggregate"]["frames"] == 500
