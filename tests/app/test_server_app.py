"""A run from waiting for sites to its last record, with sites that answer by script.

The model, checkpoints, journal and messages are the real ones; what a real site answers is tested
in test_client_app.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from app import payload, requests, rounds, server_app, statistics, tensorfile, trainables
from app.config import RunConfig
from app.description import Description
from app.exchange import Exchange
from app.job import WANT_FULL
from app.journal import read_config, read_rounds, runs_root
from app.policy import frozen_hash, trainable_names
from certs.errors import ConfigError, FleetError, ModelError, RunFailedError, StorageError


@pytest.fixture(autouse=True)
def process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """What Flower sets when it starts a task; short polls; runs in a temporary directory."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    # main() takes Flower's logger off the root, where caplog listens.
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "filters", [])
    logger.addHandler(caplog.handler)
    monkeypatch.setenv("VLAFLEET_RUNS", str(tmp_path / "runs"))
    for function in (rounds.wait_for_sites, Exchange.__init__):
        assert function.__kwdefaults__
        monkeypatch.setitem(function.__kwdefaults__, "poll_s", 0.02)
    yield
    logger.removeHandler(caplog.handler)


def moments(mean: float, count: int = 100) -> dict[str, statistics.Moments]:
    part = statistics.Moments(count, np.full(6, mean), np.full(6, 25.0 * count))
    return {"observation.state": part, "action": part}


@dataclass
class FakeSite:
    """A site that moves every trainable value by ``step`` and whose loss is the model's distance.

    It keeps the model it was sent, as a real one does, and asks for the whole one where it must.
    """

    base: Path
    step: float
    config: RunConfig = field(default_factory=RunConfig)
    mean: float = 0.0
    frames: int = 100
    fps: int = 30
    site: str = ""
    # Replaces the answer to the n-th message (0 describe, 1 evaluate, 2 train, 3 evaluate ...).
    override: dict[int, Callable[[Message], Message | None]] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    statistics: set[str] = field(default_factory=set)
    told: list[dict[str, Any]] = field(default_factory=list)
    forms: list[str] = field(default_factory=list)
    held: dict[str, Any] = field(default_factory=dict)
    # A site may lose what it held; then it says so.
    forgets: bool = False

    def __post_init__(self) -> None:
        self.own = dict(trainables.initial(self.config, self.base))
        self.held = dict(self.own)

    def answer(self, message: Message) -> Message | None:
        turn = len(self.seen)
        self.seen.append(message.metadata.message_type)
        if turn in self.override:
            return self.override[turn](message)
        return getattr(self, message.metadata.message_type)(message)  # type: ignore[no-any-return]

    def query(self, message: Message) -> Message:
        described = Description(
            site=self.site, dataset="recorded", train_episodes=4, held_out_episodes=1,
            train_frames=self.frames, held_out_frames=25, fps=self.fps, cameras=("top", "wrist"),
            tasks=("Pick.",), moments=moments(self.mean), held=payload.canonical_hash(self.held),
            chunk_bytes=0,
        )  # fmt: skip
        return Message(described.to_records(), reply_to=message)

    def read(self, message: Message) -> payload.Payload | None:
        told = dict(message.content.config_records["request"])
        self.told.append(told)
        self.statistics.add(str(told["statistics"]))
        model = payload.from_records(message.content, kind="model")
        self.forms.append(model.form)
        if self.forgets and model.form != "full":
            return None
        self.forgets = False
        self.held = dict(payload.apply(self.held, model))
        assert payload.canonical_hash(self.held) == model.target
        self.means.append(float(next(iter(self.held.values())).mean()))
        return model

    def train(self, message: Message) -> Message:
        model = self.read(message)
        if model is None:
            return Message(WANT_FULL.to_records(), reply_to=message)
        return Message(self.update(model, self.step), reply_to=message)

    def update(self, model: payload.Payload, step: float, **manifest: Any) -> RecordDict:
        # Raw bytes: a hostile site does not stop at the encoder's refusal of NaN.
        parts = (
            (name, array.shape, np.full_like(array, step).tobytes())
            for name, array in sorted(self.held.items())
        )
        options = {"codec": "fp32", "base": model.target, "frozen": model.frozen, **manifest}
        update = payload.pack_encoded(parts, kind="update", target=None, **options)
        records = payload.to_records(update)
        records["metrics"] = MetricRecord({"loss": 0.5, "frames": self.frames, "grad_norm": 1.0})
        return records

    def evaluate(self, message: Message) -> Message:
        if self.read(message) is None:
            return Message(WANT_FULL.to_records(), reply_to=message)
        loss = 2.0 - 0.1 * len(self.means)
        metrics = MetricRecord({"loss": loss, "frames": 25, "rmse_deg": [loss] * 6})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)


@dataclass
class Node:
    node_id: int
    name: str


@dataclass
class FakeGrid:
    """Flower's Grid over scripted sites, by registered name."""

    sites: dict[str, FakeSite]
    registered: bool = True
    # Who is online until round 1 is over; empty: everyone.
    first_online: tuple[str, ...] = ()
    replies: dict[str, Message | None] = field(default_factory=dict)

    def get_nodes(self) -> list[Node]:
        early = len(self.replies) < 4 * len(self.first_online)
        here = self.first_online if early else tuple(self.sites)
        return [
            Node(n, name if self.registered else "")
            for n, name in enumerate(self.sites, start=1)
            if name in here
        ]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            site = list(self.sites.values())[message.metadata.dst_node_id - 1]
            ids.append(f"m{len(self.replies)}")
            self.replies[ids[-1]] = site.answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self.replies[message_id] for message_id in message_ids]
        return [reply for reply in found if reply]


def start(
    sites: dict[str, FakeSite],
    base: Path,
    *,
    registered: bool = True,
    first_online: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    # fp32 and a constant rate, so that sums come out as written below.
    plain: dict[str, Any] = {"rounds": 2, "round_timeout": 5.0, "model": str(base)}
    plain |= {"codec": "fp32", "schedule": "constant"}
    # A resumed run takes its settings from its record.
    run_config = RunConfig(**(config if "resume" in config else {**plain, **config}))
    # As Flower does, give every run an id of its own.
    run = 17 + len(list(runs_root().glob("[0-9]*")))
    context = Context(run, 0, {}, RecordDict(), run_config.as_dict())
    server_app.main(FakeGrid(sites, registered, first_online), context)  # type: ignore[arg-type]
    return runs_root() / str(run)


def two(base: Path, **config: Any) -> dict[str, FakeSite]:
    run = RunConfig(**config)
    # Weighted by frames: (300 * 0.5 - 100 * 0.1) / 400 = 0.35 a round.
    return {
        "site-a": FakeSite(base, step=0.5, config=run, mean=0.0, frames=300),
        "site-b": FakeSite(base, step=-0.1, config=run, mean=10.0, frames=100),
    }


def test_a_run_moves_the_model_by_the_weighted_mean_each_round(tiny_base: Path) -> None:
    sites = two(tiny_base)
    directory = start(sites, tiny_base)
    expected = ["query", "evaluate", "train", "evaluate", "train", "evaluate"]
    assert [site.seen for site in sites.values()] == [expected, expected]
    names = trainable_names(tiny_base)
    before = tensorfile.read(tiny_base / "model.safetensors", names)
    for number in range(3):
        path = directory / "checkpoints" / f"round-{number:04d}"
        after = tensorfile.read(path / "model.safetensors", names)
        for name in names:
            np.testing.assert_allclose(after[name], before[name] + 0.35 * number, atol=1e-5)
    # Round 0 was measured on the base model, each later one on what the sites had just made.
    first = next(iter(before.values())).mean()
    moved = np.array(sites["site-a"].means) - first
    np.testing.assert_allclose(moved, [0, 0, 0.35, 0.35, 0.7], atol=1e-4)


def test_statistics_are_pooled_once_and_reach_sites_and_checkpoints(tiny_base: Path) -> None:
    sites = two(tiny_base)
    directory = start(sites, tiny_base)
    (pooled,) = sites["site-a"].statistics | sites["site-b"].statistics
    part = statistics.from_bytes(pooled.encode())["action"]
    assert part.count == 200
    np.testing.assert_allclose(part.mean, 5.0)
    # Within each site a variance of 25, between them (10 / 2) ** 2.
    deviation = np.sqrt(50)
    config = read_config(directory)
    recorded = statistics.from_bytes(json.dumps(config["statistics"]).encode())
    np.testing.assert_allclose(statistics.normalisation(recorded)["action"]["std"], deviation)
    for path in (directory / "checkpoints").glob("round-*"):
        (state,) = path.glob("policy_postprocessor*unnormalizer_processor.safetensors")
        stored = tensorfile.read(state, ["action.mean", "action.std"])
        np.testing.assert_allclose(stored["action.std"], deviation, rtol=1e-6)


def test_the_record_has_every_round_and_site(tiny_base: Path) -> None:
    directory = start(two(tiny_base), tiny_base)
    config, records = read_config(directory), read_rounds(directory)
    assert config["run"] == "17"
    assert config["config"]["rounds"] == 2
    assert config["sites"]["site-b"]["train_frames"] == 100
    assert config["model"]["frozen"] == frozen_hash(tiny_base)
    assert [record["round"] for record in records] == [0, 1, 2]
    zero, one, two_ = records
    values = config["model"]["trainable_values"]
    assert zero["sites"]["site-a"]["train"] is None
    assert zero["aggregate"]["train_loss"] is None
    assert zero["aggregate"]["loss"] == pytest.approx(1.9)
    assert one["aggregate"] == {
        "train_loss": 0.5,
        "frames": 400,
        "loss": pytest.approx(1.7),
        "rmse_deg": pytest.approx([1.7] * 6),
        "participation": 1.0,
        "seconds": one["aggregate"]["seconds"],
    }
    # Taking in and combining updates happens within these two phases; round 0 has nothing to combine.
    assert 0 < one["aggregate"]["seconds"] < sum(one["seconds"][k] for k in ("collect", "commit"))
    assert zero["aggregate"]["seconds"] is None
    assert one["started_at"] <= one["ended_at"] <= two_["started_at"]
    train = one["sites"]["site-b"]["train"]
    assert train["state"] == "completed"
    assert (train["reason"], train["cause"]) == (None, None)
    assert (train["loss"], train["frames"], train["grad_norm"]) == (0.5, 100, 1.0)
    # Not reported by this site: null, never 0.
    assert train["last_loss"] is None
    # Only trainable values travel: 4 bytes each, up in training and down in evaluation; the next
    # round finds the model at the site.
    assert (train["bytes_down"], train["bytes_up"]) == (0, values * 4)
    assert one["bytes"] == {"down": 2 * values * 4, "up": 2 * values * 4}
    assert train["form"] == "held"
    assert one["sites"]["site-b"]["evaluate"]["form"] == "delta"
    assert train["update_norm"] == pytest.approx(0.1 * values**0.5, rel=1e-5)
    assert len(train["payload_sha256"]) == 64
    assert list(one["seconds"]) == ["select", "dispatch", "collect", "commit", "evaluate"]
    assert list(zero["seconds"]) == ["commit", "evaluate"]
    assert two_["model"] != one["model"] != zero["model"] == config["model"]["hash"]
    federation = json.loads((directory / two_["checkpoint"] / "federation.json").read_text())
    assert federation["model"] == two_["model"]
    assert federation["participants"] == [
        {"site": "site-a", "frames": 300},
        {"site": "site-b", "frames": 100},
    ]


def test_who_watches_sees_where_the_run_is(tiny_base: Path, tmp_path: Path) -> None:
    """Each site looks at the run's progress when its message comes, as an exporter would."""
    seen: list[tuple[Any, ...]] = []
    sites = two(tiny_base, rounds=1)
    site_b = sites["site-b"]
    asked = ("query", "evaluate", "train", "evaluate")

    def looking(message: Message) -> Message:
        now = json.loads((tmp_path / "runs" / "17" / "progress.json").read_text())
        working = {
            name: (site["kind"], site["state"])
            for name, site in now["sites"].items()
            if site["state"] == "working"
        }
        seen.append((now["phase"], now["round"], now["rounds"], working))
        turn = asked[len(seen) - 1]
        return getattr(site_b, turn)(message)  # type: ignore[no-any-return]

    site_b.override = dict.fromkeys(range(4), looking)
    directory = start(sites, tiny_base, rounds=1)
    assert seen == [
        (phase, number, 1, dict.fromkeys(sites, (kind, "working")))
        for phase, number, kind in [
            ("describe", 0, "describe"),
            ("evaluate", 0, "evaluate"),
            ("dispatch", 1, "train"),
            ("evaluate", 1, "evaluate"),
        ]
    ]
    last = json.loads((directory / "progress.json").read_text())
    assert (last["run"], last["phase"], last["round"], last["sites"]) == ("17", "done", 1, {})
    # A run that fails says that it is over, too.
    with pytest.raises(RunFailedError):
        start(sites, tiny_base, min_sites=3, round_timeout=0.1)
    last = json.loads((tmp_path / "runs" / "18" / "progress.json").read_text())
    assert (last["run"], last["phase"]) == ("18", "done")


def test_the_log_keeps_its_form(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flwr"):
        start(two(tiny_base), tiny_base)
    lines = "\n".join(caplog.messages)
    for form in (
        r"^describe: site-a completed, 5 episodes \(1 held out\), 300 training frames, \d+\.\d s$",
        r"^round 0/2 evaluate: site-b completed, loss 1\.900, 25 frames, \d+\.\d s$",
        r"^round 0/2: held-out loss 1\.900$",
        r"^round 1/2 train: site-a completed, loss 0\.500, 300 frames, \d+\.\d s$",
        r"^round 1/2 commit: 2 of 2 sites, 400 frames, model [0-9a-f]{12}, \d+\.\d s$",
        r"^round 2/2: held-out loss 1\.500, -21\.1 % against round 0$",
        r"^run 17 finished: 2 of 2 rounds committed, model in .*/17/checkpoints/latest$",
    ):
        assert re.search(form, lines, re.MULTILINE), form


def test_a_line_names_its_run_and_its_round(
    tiny_base: Path, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    start(two(tiny_base), tiny_base)
    found = lines()
    assert {line["run"] for line in found} == {"17"}
    trained = {line["message"]: line["round"] for line in found if " train: " in line["message"]}
    assert [message.startswith(f"round {number}/2") for message, number in trained.items()] == (
        [True] * 4
    )


def test_what_a_reply_says_of_the_sites_machine_is_on_record(tiny_base: Path) -> None:
    figures = {
        "samples_per_second": 71.5, "data_wait": 0.125, "gpu_memory_bytes": 20 << 30,
        "gpu_memory_total_bytes": 80 << 30, "gpu_utilization": 0.97, "disk_free_bytes": 3 << 40,
        "disk_size_bytes": 4 << 40, "trainer_restarts": 2,
    }  # fmt: skip
    sites = two(tiny_base, rounds=1)
    site_b = sites["site-b"]

    def told(message: Message) -> Message:
        reply = site_b.train(message)
        known = dict(reply.content.metric_records["metrics"])
        reply.content["metrics"] = MetricRecord({**known, **figures})
        return reply

    site_b.override = {2: told}
    record = read_rounds(start(sites, tiny_base, rounds=1))[1]
    entries = {name: site["train"] for name, site in record["sites"].items()}
    assert entries["site-b"] | figures == entries["site-b"]
    # What a site of an older release leaves out was not measured.
    assert {entries["site-a"][name] for name in figures} == {None}


def error(message: Message) -> Message:
    return Message(Error(2, "The disk is full:\nclean it."), reply_to=message)


def test_a_site_that_fails_does_not_stop_the_others(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sites = two(tiny_base)
    site_b = sites["site-b"]

    def poison(message: Message) -> Message:
        model = site_b.read(message)
        assert model
        return Message(site_b.update(model, float("nan")), reply_to=message)

    site_b.override = {2: error, 4: poison, 5: error}
    directory = start(sites, tiny_base)
    one, two_ = read_rounds(directory)[1:]
    assert one["sites"]["site-b"]["train"]["state"] == "error"
    assert one["sites"]["site-b"]["train"]["reason"] == "The disk is full: clean it."
    assert one["sites"]["site-b"]["train"]["loss"] is None
    assert one["aggregate"]["frames"] == 300
    assert two_["sites"]["site-b"]["train"]["state"] == "invalid"
    assert "not finite" in two_["sites"]["site-b"]["train"]["reason"]
    assert "round 1/2 train: site-b error, The disk is full: clean it." in caplog.text
    assert "round 2/2: held-out loss 1.500, not of all sites" in caplog.messages
    # Only site-a's step of 0.5 was taken, twice.
    moved = np.array(sites["site-a"].means) - sites["site-a"].means[0]
    np.testing.assert_allclose(moved[-1], 1.0, atol=1e-4)


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ({"loss": 1, "frames": 25}, "metrics"),
        ({"loss": 1.0, "frames": 2.5}, "metrics"),
        ({"loss": 1.0, "frames": -25}, "metrics"),
        ({"loss": 1.0, "frames": 25, "rmse_deg": [1.0, 2.0]}, "metrics"),
        ({"loss": [1.0], "frames": 25}, "metrics"),
        ({"loss": float("nan"), "frames": 25}, "finite"),
        ({"loss": 1.0, "frames": 25, "rmse_deg": [1.0, float("inf"), *[1.0] * 4]}, "finite"),
    ],
)
def test_metrics_of_the_wrong_type_are_refused(tiny_base: Path, metrics: Any, cause: str) -> None:
    sites = two(tiny_base)
    sites["site-b"].override = {
        1: lambda message: Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
    }
    zero = read_rounds(start(sites, tiny_base, rounds=1))[0]
    refused = zero["sites"]["site-b"]["evaluate"]
    assert (refused["state"], refused["cause"]) == ("invalid", cause)
    assert zero["aggregate"]["loss"] == pytest.approx(1.9)


def test_a_round_without_an_update_keeps_the_last_model(tiny_base: Path, tmp_path: Path) -> None:
    sites = two(tiny_base)
    for site in sites.values():
        site.override = {4: error}
    with pytest.raises(RunFailedError, match="1 of 2 rounds were committed"):
        start(sites, tiny_base)
    directory = tmp_path / "runs" / "17"
    one, two_ = read_rounds(directory)[1:]
    assert not two_["committed"]
    assert two_["reason"] == "0 valid updates where the quorum is 1: the last model stays"
    assert (two_["model"], two_["checkpoint"]) == (one["model"], None)
    assert two_["sites"]["site-a"]["evaluate"] is None
    assert list(two_["seconds"]) == ["select", "dispatch", "collect", "fail"]
    assert (directory / "checkpoints" / "latest").resolve().name == "round-0001"


def test_a_site_that_cannot_describe_itself_takes_no_part(tiny_base: Path) -> None:
    sites = {**two(tiny_base), "site-c": FakeSite(tiny_base, step=1.0, override={0: error})}
    directory = start(sites, tiny_base)
    assert sites["site-c"].seen == ["query"]
    assert list(read_config(directory)["sites"]) == ["site-a", "site-b"]


def test_too_few_sites_end_the_run_with_their_reasons(tiny_base: Path) -> None:
    sites = two(tiny_base)
    sites["site-b"].override = {0: error}
    with pytest.raises(RunFailedError, match=r"1 of the 2 sites .*site-b: The disk is full"):
        start(sites, tiny_base)
    sites = two(tiny_base)
    sites["site-b"].fps = 25
    with pytest.raises(RunFailedError, match="site-a 30, site-b 25"):
        start(sites, tiny_base)


def test_waiting_for_sites_is_bounded(tiny_base: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RunFailedError, match="2 of the 3 sites"):
        start(two(tiny_base), tiny_base, min_sites=3, round_timeout=0.3)
    assert time.monotonic() - started < 5


def test_the_registry_names_sites_and_without_one_they_name_themselves(tiny_base: Path) -> None:
    sites = two(tiny_base)
    sites["site-a"].site, sites["site-b"].site = "impostor", "site-b"
    assert list(read_config(start(sites, tiny_base))["sites"]) == ["site-a", "site-b"]
    sites = two(tiny_base)
    sites["site-a"].site, sites["site-b"].site = "own-a", "own-b"
    directory = start(sites, tiny_base, registered=False)
    assert list(read_config(directory)["sites"]) == ["own-a", "own-b"]
    sites = two(tiny_base)
    sites["site-a"].site = sites["site-b"].site = "same"
    with pytest.raises(RunFailedError, match="Another site is called same already"):
        start(sites, tiny_base, registered=False)
    sites = two(tiny_base)
    sites["site-a"].site, sites["site-b"].site = "../../etc", "own-b"
    with pytest.raises(RunFailedError, match="is not allowed: use 1 to 63"):
        start(sites, tiny_base, registered=False)


def test_a_bad_run_config_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    context = Context(17, 0, {}, RecordDict(), {"ronuds": 3})
    with pytest.raises(ConfigError, match="unknown key 'ronuds'"):
        server_app.main(FakeGrid({}), context)  # type: ignore[arg-type]
    assert not (tmp_path / "runs").exists()


def test_an_expected_failure_is_logged_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("flwr")
    kept = server_app._OneSentence()
    logger.addFilter(kept)
    try:
        for raised in (FleetError("Too few sites."), ValueError("a bug")):
            # As flwr/superlink/runtime/run_serverapp.py logs what a ServerApp raises.
            logger.error("%s raised an exception", "ServerApp", exc_info=raised)
    finally:
        logger.removeFilter(kept)
    expected, bug = caplog.records
    assert expected.getMessage() == "ServerApp raised an exception: Too few sites."
    assert expected.exc_info is None
    assert bug.exc_info


def test_the_serverapp_imports_neither_torch_nor_lerobot() -> None:
    code = (
        "import sys, app.server_app;"
        "print([m for m in ('torch', 'lerobot', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_site_gets_the_model_as_it_needs_it(tiny_base: Path) -> None:
    """Nothing where it holds it, the change where it holds the last one, else the whole model."""
    sites = two(tiny_base)
    site_b = sites["site-b"]

    def lost(message: Message) -> Message | None:
        site_b.forgets = True
        return site_b.evaluate(message)

    # Its reply to round 1's evaluation is lost with its disk.
    site_b.override = {3: lost}
    directory = start(sites, tiny_base, rounds=3)
    assert sites["site-a"].forms == ["held", "held", "delta", "held", "delta", "held", "delta"]
    # It could not use the delta and asked for the whole model within the same round.
    assert site_b.forms == ["held", "held", "delta", "full", "held", "delta", "held", "delta"]
    records = read_rounds(directory)
    values = read_config(directory)["model"]["trainable_values"]
    entry = records[1]["sites"]["site-b"]["evaluate"]
    assert (entry["state"], entry["form"]) == ("completed", "full")
    assert entry["bytes_down"] == 2 * 4 * values
    assert all(record["committed"] and not record["degraded"] for record in records)


def test_every_combination_of_codec_and_strategy_moves_the_model(tiny_base: Path) -> None:
    before = tensorfile.read(tiny_base / "model.safetensors", trainable_names(tiny_base))
    combinations: list[dict[str, Any]] = [
        {"codec": "bf16", "strategy": "fedavgm", "server_momentum": 0.5},
        {"codec": "int4", "strategy": "fedadam", "server_learning_rate": 0.1},
        {"codec": "int8", "robust": "median", "quorum": 3},
        {"codec": "fp32", "robust": "trimmed-mean", "trim": 0.3, "quorum": 3},
    ]
    for options in combinations:
        # The third site moves against the others, and far.
        third = {"site-c": FakeSite(tiny_base, step=-9.0)} if "robust" in options else {}
        directory = start({**two(tiny_base), **third}, tiny_base, **options)
        after = tensorfile.Lazy(
            directory / "checkpoints" / "latest" / "model.safetensors", list(before)
        )
        moved = {float(np.median(after[name] - before[name])) for name in before}
        # With an update of 0.35 a round FedAvgM takes 0.35, then 0.35 + 0.5 * 0.35; FedAdam
        # 0.1 * 0.035 / (0.035 + 0.001), then 0.1 * 0.0665 / (0.04937 + 0.001). A robust mean of
        # 0.5, -0.1 and -9 takes -0.1 a round.
        expected = {"fedavgm": 0.875, "fedadam": 0.2292}.get(str(options.get("strategy")), -0.2)
        assert moved == pytest.approx([expected] * len(moved), rel=0.02), options


def test_a_run_stops_early_and_keeps_the_best_round(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    losses = {0: 2.0, 1: 1.0, 2: 1.5, 3: 1.2, 4: 0.1}
    sites = two(tiny_base)
    for site in sites.values():

        def evaluate(message: Message, site: FakeSite = site) -> Message:
            site.read(message)
            number = int(message.content.config_records["request"]["round"])  # type: ignore[arg-type]
            metrics = MetricRecord({"loss": losses[number], "frames": 25})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        site.override = dict.fromkeys((1, 3, 5, 7, 9), evaluate)
    with caplog.at_level(logging.INFO, "flwr"):
        directory = start(sites, tiny_base, rounds=4, patience=2)
    assert [record["best"] for record in read_rounds(directory)] == [0, 1, 1, 1]
    assert (directory / "checkpoints" / "best").resolve().name == "round-0001"
    assert read_config(directory)["ended"]["reason"] == "early stopping"
    assert "round 3/4: no better held-out loss for 2 rounds, the best is round 1" in caplog.messages
    with pytest.raises(RunFailedError, match="Run 17 has ended"):
        start(two(tiny_base), tiny_base, resume=True)


def test_sites_are_drawn_and_the_first_replies_close_the_round(tiny_base: Path) -> None:
    sites = {f"site-{n}": FakeSite(tiny_base, step=0.1) for n in range(6)}
    directory = start(sites, tiny_base, sites_per_round=2, over_sampling=1.5, rounds=3)
    drawn = []
    for record in read_rounds(directory)[1:]:
        asked = {name: site["train"] for name, site in record["sites"].items() if site["train"]}
        assert len(asked) == 3
        assert sorted(entry["state"] for entry in asked.values()) == [
            "completed",
            "completed",
            "late",
        ]
        assert record["aggregate"]["participation"] == pytest.approx(2 / 3)
        # Not being drawn is no failure, and everyone evaluates.
        assert all(site["evaluate"]["state"] == "completed" for site in record["sites"].values())
        drawn.append(frozenset(asked))
    assert len(set(drawn)) > 1


def test_a_site_that_comes_later_joins_the_run(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sites = {**two(tiny_base), "site-c": FakeSite(tiny_base, step=0.2, mean=50.0)}
    with caplog.at_level(logging.INFO, "flwr"):
        directory = start(sites, tiny_base, rounds=3, first_online=("site-a", "site-b"))
    records = read_rounds(directory)
    assert [len(record["sites"]) for record in records] == [2, 2, 3, 3]
    joined = records[2]["sites"]["site-c"]["train"]
    assert (joined["state"], joined["form"]) == ("completed", "delta")
    assert "round 2/3: site-c joined" in caplog.messages
    # The statistics of the run stay those it began with.
    assert sites["site-c"].statistics == sites["site-a"].statistics
    assert sorted(read_config(directory)["sites"]) == ["site-a", "site-b", "site-c"]


def test_a_round_waits_for_its_quorum_and_fails_without_it(tiny_base: Path, tmp_path: Path) -> None:
    sites = two(tiny_base)
    sites["site-b"].override = {4: error}
    with pytest.raises(RunFailedError, match="1 of 2 rounds"):
        start(sites, tiny_base, quorum=2)
    _, one, two_ = read_rounds(tmp_path / "runs" / "17")
    assert one["committed"]
    assert two_["reason"] == "1 valid updates where the quorum is 2: the last model stays"
    assert (two_["model"], two_["aggregate"]["participation"]) == (one["model"], 0.5)


def test_a_resumed_run_keeps_its_settings_and_its_name(tiny_base: Path, tmp_path: Path) -> None:
    sites = two(tiny_base)
    for site in sites.values():
        site.override = {4: error, 5: error, 6: error}
    with pytest.raises(RunFailedError, match="1 of 3 rounds"):
        start(sites, tiny_base, rounds=3, round_timeout=2.0)
    # The run ended; a run without an end, as a kill leaves it, is resumed.
    directory = tmp_path / "runs" / "17"
    config = json.loads((directory / "config.json").read_text())
    config["ended"] = None
    (directory / "config.json").write_text(json.dumps(config))
    lines = (directory / "rounds.jsonl").read_text().splitlines(keepends=True)
    (directory / "rounds.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ConfigError, match=r"batch-size=4 beside resume=true, and run 17 was"):
        start(two(tiny_base), tiny_base, resume=True, batch_size=4)
    config["config"]["model"] = str(copy_of(tiny_base, tmp_path / "changed"))
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is not the one that run 17 began"):
        start(two(tiny_base), tiny_base, resume=True)
    config["config"]["model"] = str(tiny_base)
    (directory / "config.json").write_text(json.dumps(config))
    start(two(tiny_base), tiny_base, resume=True)
    again = read_config(directory)
    assert (again["run"], again["ended"]["reason"]) == ("17", "completed")
    assert again["runs"] == ["17", "18"]
    assert [record["round"] for record in read_rounds(directory)] == [0, 1, 2, 3]


def test_adapters_are_exchanged_and_resumed_and_published_merged(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora: dict[str, Any] = {"exchange": "lora", "lora_rank": 4}
    sites = two(tiny_base, **lora)
    directory = start(sites, tiny_base, strategy="fedavgm", server_momentum=0.5, **lora)
    # As a kill in round 3 leaves it.
    config = read_config(directory)
    config["config"]["rounds"], config["ended"] = 3, None
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="lora-rank=8 beside resume=true"):
        start(sites, tiny_base, resume=True, exchange="lora", lora_rank=8)
    # One site has what it held, the other starts anew.
    sites["site-b"] = two(tiny_base, **lora)["site-b"]
    start(sites, tiny_base, resume=True)
    assert sites["site-a"].forms == ["held", "held", "delta", "held", "delta", "held", "delta"]
    assert sites["site-b"].forms == ["full", "delta"]

    first = trainables.initial(RunConfig(**lora), tiny_base)
    adapted = trainables.targets(tiny_base)
    assert config["model"] | {"lora_rank": 4, "lora_alpha": 8} == config["model"]
    assert config["model"]["trainable_values"] == sum(4 * sum(shape) for shape in adapted.values())
    base, _ = tensorfile.entries(tiny_base / "model.safetensors")
    # Momentum, and so the server's state, goes on in the resumed round.
    moved = 0.0
    for number, step in enumerate((0.0, 0.35, 0.525, 0.6125)):
        moved += step
        path = directory / "checkpoints" / f"round-{number:04d}"
        adapters = tensorfile.read(path / "adapters.safetensors", first)
        for name, array in adapters.items():
            np.testing.assert_allclose(array, first[name] + np.float32(moved), atol=1e-5)
        found, _ = tensorfile.entries(path / "model.safetensors")
        assert found.keys() == base.keys()
        for name, shape in adapted.items():
            change = 2 * adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
            merged = tensorfile.read(path / "model.safetensors", [f"{name}.weight"])
            before = tensorfile.read(tiny_base / "model.safetensors", [f"{name}.weight"])
            assert change.shape == shape
            (after,), (was,) = merged.values(), before.values()
            np.testing.assert_allclose(after, was + change, atol=1e-5)
    card = (directory / "model_card.md").read_text()
    assert "| `exchange` | lora |" in card
    assert "(rank 4, alpha 8)" in card


def copy_of(base: Path, target: Path) -> Path:
    """The same model with one trainable value changed."""
    shutil.copytree(base.parent, target)
    path = target / base.name / "model.safetensors"
    tensors = dict(tensorfile.read(path, trainable_names(base)))
    first = next(iter(tensors))
    tensors[first] = tensors[first] + np.float32(1)
    tensorfile.write(path.with_suffix(".new"), tensors, base=path)
    path.with_suffix(".new").rename(path)
    return path.parent


def test_rounds_are_pushed_and_the_best_one_at_the_end(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a push does is tested against a hub in test_hub; one that fails never fails the run."""
    pushed: list[tuple[str, str, bool, str]] = []

    def push(checkpoint: Path, repository: str, *, private: bool, card: Path, message: str) -> str:
        assert card.read_text().startswith("---")
        pushed.append((checkpoint.name, repository, private, message))
        if len(pushed) == 1:
            raise ModelError("The hub is not there.")
        return "https://hub/lab/policy"

    monkeypatch.setattr("app.hub.push", push)
    with caplog.at_level(logging.INFO, "flwr"):
        directory = start(two(tiny_base), tiny_base, rounds=5, push_to="lab/policy", push_every=2)
    run = directory.name
    assert pushed == [
        ("round-0002", "lab/policy", True, f"Round 2 of run {run}"),
        ("round-0004", "lab/policy", True, f"Round 4 of run {run}"),
        ("round-0005", "lab/policy", True, f"Round 5 of run {run}"),
    ]
    assert "round 2: not pushed: The hub is not there." in caplog.messages
    assert "round 4/5: pushed to https://hub/lab/policy" in caplog.messages
    assert read_config(directory)["ended"]["reason"] == "completed"
    with pytest.raises(ConfigError, match="push-to='policy': it takes 'owner/name'"):
        start(two(tiny_base), tiny_base, push_to="policy")


def test_a_dataset_at_the_server_is_evaluated_beside_the_sites(
    tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    uris = f"{tiny_dataset} {tmp_path / 'none'}"
    directory = start(
        two(tiny_base), tiny_base, rounds=1, round_timeout=300.0, eval_batches=1, eval_datasets=uris
    )
    zero, one = (record["server"] for record in read_rounds(directory))
    for found in (zero, one):
        assert list(found) == uris.split()
        assert found[str(tiny_dataset)]["reason"] is None
        assert found[str(tmp_path / "none")]["loss"] is None
        assert "does not exist" in found[str(tmp_path / "none")]["reason"]
    assert zero[str(tiny_dataset)]["loss"] != one[str(tiny_dataset)]["loss"]


def test_a_run_leaves_its_report_and_its_card(tiny_base: Path) -> None:
    directory = start(two(tiny_base), tiny_base)
    assert "data:image/svg+xml" in (directory / "report.html").read_text()
    assert "library_name: lerobot" in (directory / "model_card.md").read_text()


def test_a_full_disk_at_the_server_is_no_fault_of_a_site(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(payload.Payload, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        start(two(tiny_base), tiny_base)
    directory = tmp_path / "runs" / "17"
    assert "No space left" in read_config(directory)["ended"]["reason"]
    assert len(read_rounds(directory)) == 1
    # With room on the disk the run goes on.
    monkeypatch.undo()
    monkeypatch.setenv("VLAFLEET_RUNS", str(tmp_path / "runs"))
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    start(two(tiny_base), tiny_base, resume=True)
    assert [record["committed"] for record in read_rounds(directory)] == [True, True, True]


def test_a_run_of_an_older_release_is_resumed_and_reported(tiny_base: Path, tmp_path: Path) -> None:
    """Its records lack what later ones say beside; its last round was committed and not recorded."""
    directory = start(two(tiny_base), tiny_base)
    (directory / "progress.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"ended": None}))
    federation = directory / "checkpoints" / "round-0002" / "federation.json"
    committed = json.loads(federation.read_text())
    old = [without_additions(record) for record in read_rounds(directory)]
    committed["record"] = without_additions(committed["record"])
    federation.write_text(json.dumps(committed))
    lines = "".join(json.dumps(record) + "\n" for record in old[:2])
    (directory / "rounds.jsonl").write_text(lines)

    start(two(tiny_base), tiny_base, resume=True)
    records = read_rounds(directory)
    assert records[:2] == old[:2]
    assert [record["committed"] for record in records] == [True] * 3
    # The round was combined by a process that is no more.
    assert records[2]["aggregate"]["seconds"] is None
    assert (directory / "report.html").exists()
    assert (directory / "model_card.md").exists()
    assert json.loads((directory / "progress.json").read_text())["phase"] == "done"


def without_additions(record: dict[str, Any]) -> dict[str, Any]:
    """A record as releases wrote it that knew nothing of causes, machines and when a round ended."""
    added = {"ended_at", "cause", *requests._MACHINE}

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in added}
        return value

    old: dict[str, Any] = strip(record)
    old.get("aggregate", {}).pop("seconds", None)
    return old
