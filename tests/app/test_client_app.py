"""A site's answers, from the real policy on a real dataset, and a federation of two of them."""

import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from app import (
    cause,
    client_app,
    payload,
    rounds,
    server_app,
    server_evaluation,
    statistics,
    tensorfile,
    trainables,
)
from app.broadcast import wanted
from app.config import RunConfig, home
from app.dataset import open_dataset
from app.description import Description
from app.exchange import Exchange
from app.frames import Frames
from app.job import Answer
from app.journal import read_rounds, runs_root
from app.policy import frozen_hash, trainable_names
from app.site_state import Kept, SiteState
from app.supervisor import restarts, supervised
from certs.errors import DatasetError


@pytest.fixture(autouse=True)
def process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Iterator[None]:
    """What Flower sets when it starts a task; a site's state goes to a temporary directory."""
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path / "home"))
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    # main() takes Flower's logger off the root, where caplog listens.
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "filters", [])
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def config(base: Path, **changes: Any) -> RunConfig:
    small: dict[str, Any] = {"rounds": 2, "local_steps": 3, "batch_size": 4, "eval_batches": 2}
    return RunConfig(model=str(base), **{**small, **changes})


def context(dataset: Path | str, run: RunConfig, **node: Any) -> Context:
    node_config = {"site": "site-a", "dataset": str(dataset), **node}
    return Context(1, 1, node_config, RecordDict(), run.as_dict())


def terms(run: RunConfig, **told: Any) -> ConfigRecord:
    return ConfigRecord({"lineage": "17", "config": json.dumps(run.as_dict()), **told})


def ask(kind: str, where: Context, content: RecordDict | None = None) -> Message:
    if content is None:
        content = RecordDict({"request": terms(RunConfig.parse(where.run_config))})
    message = Message(content, 1, kind)
    message.metadata.__dict__["_message_id"] = "asked"
    return client_app.app(message, where)


def described(dataset: Path, run: RunConfig) -> Description:
    return Description.from_records(ask(MessageType.QUERY, context(dataset, run)).content)


def request(
    tiny: Path, site: Description, run: RunConfig, number: int = 1, **manifest: Any
) -> RecordDict:
    """The base model, whole, with what the ServerApp says beside it."""
    tensors = trainable(tiny)
    whole = {
        "codec": "fp32", "base": None, "target": payload.canonical_hash(tensors),
        "frozen": frozen_hash(tiny),
    }  # fmt: skip
    content = payload.to_records(
        payload.pack(sorted(tensors.items()), kind="model", **{**whole, **manifest})
    )
    told = {"scale": 1.0, "mu": 0.0} if number else {}
    pooled = statistics.to_bytes(site.moments).decode()
    content["request"] = terms(run, round=number, statistics=pooled, **told)
    return content


def trainable(base: Path) -> payload.Tensors:
    return tensorfile.read(base / "model.safetensors", trainable_names(base))


def refusal(reply: Message) -> str:
    assert reply.has_error()
    assert reply.error.reason
    return reply.error.reason


def test_a_site_describes_its_dataset(tiny_base: Path, tiny_dataset: Path) -> None:
    site = described(tiny_dataset, config(tiny_base, held_out=0.25))
    assert site.site == "site-a"
    assert (site.train_episodes, site.held_out_episodes) == (3, 1)
    assert site.train_frames + site.held_out_frames == 150
    assert site.fps == 30
    assert site.cameras == ("top", "wrist")
    assert site.tasks == ("Pick up the cube and place it in the box.",)
    # The moments are those of the training episodes alone.
    assert site.moments["action"].count == site.train_frames


def test_a_damaged_description_is_refused(tiny_base: Path, tiny_dataset: Path) -> None:
    good = described(tiny_dataset, config(tiny_base))
    for key, value in [("fps", 0), ("moments", b"{}"), ("train_frames", "many"), ("cameras", 3)]:
        records = good.to_records()
        records.config_records["description"][key] = value  # type: ignore[assignment]
        with pytest.raises(DatasetError):
            Description.from_records(records)
    with pytest.raises(DatasetError, match="cannot be read"):
        Description.from_records(RecordDict())


def test_training_answers_with_the_change_and_its_metrics(
    tiny_base: Path, tiny_dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run)
    with caplog.at_level(logging.INFO, "flwr"):
        reply = ask(MessageType.TRAIN, context(tiny_dataset, run, device="cpu"), content)
    assert not reply.has_error()
    update = payload.from_records(reply.content, kind="update")
    before = trainable(tiny_base)
    assert (update.base, update.frozen) == (payload.canonical_hash(before), frozen_hash(tiny_base))
    payload.check_tensors(update.shapes, {name: array.shape for name, array in before.items()})
    moved = sum(float(np.abs(array).sum()) for _, array in update.items())
    assert np.isfinite(moved)
    assert moved > 0
    # Nothing frozen crosses the wire: a byte for each trainable value, and its row's scale.
    values = sum(array.size for array in before.values())
    assert values < payload.wire_bytes(reply.content) < 1.2 * values
    metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
    assert metrics["frames"] == 3 * 4
    for name in ("loss", "last_loss", "grad_norm", "work_seconds", "ready_seconds"):
        assert isinstance(metrics[name], float)
        assert metrics[name] > 0
    rate = metrics["frames"] / metrics["work_seconds"]
    assert metrics["samples_per_second"] == pytest.approx(rate, rel=1e-3)
    assert 0 < metrics["data_wait"] < 1
    assert 0 < metrics["disk_free_bytes"] <= metrics["disk_size_bytes"]
    # This machine's GPU, if it has one, did not train; and no trainer did.
    assert not {"gpu_utilization", "gpu_memory_bytes", "trainer_restarts"} & metrics.keys()
    assert "round 1/2 train: step 3/3, loss " in caplog.text


def test_what_the_next_process_needs_is_on_disk_before_the_answer(
    tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod ends with its answer: Flower gives it 5 s, a slow disk needs more for SmolVLA's state."""
    kept: list[int] = []
    keep = SiteState.keep

    def slowly(self: SiteState, number: int, state: Kept) -> None:
        time.sleep(0.5)
        keep(self, number, state)
        kept.append(number)

    monkeypatch.setattr(SiteState, "keep", slowly)
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run)
    assert not ask(MessageType.TRAIN, context(tiny_dataset, run, device="cpu"), content).has_error()
    assert kept == [1]


def test_the_rate_of_a_later_round_goes_on_where_the_last_one_ended(
    tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def recording(_: RunConfig, step: int) -> float:
        asked.append(step)
        return 1e-4

    monkeypatch.setattr("app.schedule.learning_rate", recording)
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run, number=2)
    assert not ask(MessageType.TRAIN, context(tiny_dataset, run), content).has_error()
    assert asked == [3, 4, 5]


def test_evaluation_gives_the_same_numbers_twice(tiny_base: Path, tiny_dataset: Path) -> None:
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run, number=0)
    results: list[dict[str, Any]] = []
    for _ in range(2):
        reply = ask(MessageType.EVALUATE, context(tiny_dataset, run), content)
        assert not reply.has_error()
        assert payload.wire_bytes(reply.content) == 0
        results.append(dict(reply.content.metric_records["metrics"]))
    assert results[0]["loss"] == results[1]["loss"] > 0
    assert results[0]["rmse_deg"] == results[1]["rmse_deg"]
    assert len(results[0]["rmse_deg"]) == 6
    assert results[0]["frames"] == 8


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_a_foreign_frozen_model_is_refused(kind: str, tiny_base: Path, tiny_dataset: Path) -> None:
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run, frozen="0" * 64)
    reason = refusal(ask(kind, context(tiny_dataset, run), content))
    assert reason.startswith("The frozen tensors of model")
    assert reason.endswith("install the same model at every site.")


def test_expected_failures_arrive_as_one_sentence_without_a_traceback(
    tiny_base: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run)
    nowhere = context(tmp_path / "nowhere", run)
    for kind in (MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE):
        reason = refusal(ask(kind, nowhere, content))
        assert "nowhere" in reason
        assert "\n" not in reason
    no_dataset = context("", run)
    assert "has no 'dataset'" in refusal(ask(MessageType.QUERY, no_dataset))
    wrong = RecordDict({"request": ConfigRecord({"lineage": "1", "config": '{"ronuds": 1}'})})
    assert "unknown key 'ronuds'" in refusal(ask(MessageType.QUERY, context("b", run), wrong))
    for left_out in ("config", "round", "statistics", "scale"):
        lacking = request(tiny_base, described(tiny_dataset, run), run)
        del lacking.config_records["request"][left_out]
        reason = refusal(ask(MessageType.TRAIN, context(tiny_dataset, run), lacking))
        assert left_out in reason, reason
    damaged = request(tiny_base, described(tiny_dataset, run), run)
    damaged.array_records["payload"]["flat"].data = b"123"
    assert "bytes" in refusal(ask(MessageType.TRAIN, context(tiny_dataset, run), damaged))
    assert len(caplog.records) >= 7
    assert not any(record.exc_info for record in caplog.records)


def test_why_a_job_failed_is_told_in_a_word_too(
    tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = config(tiny_base)
    site = described(tiny_dataset, run)
    damaged = request(tiny_base, site, run)
    damaged.array_records["payload"]["flat"].data = b"123"
    far = config(tiny_base, warmup_steps=0, local_steps=20)
    diverging = request(tiny_base, site, far)
    diverging.config_records["request"]["scale"] = 1e24
    failures: dict[str, tuple[Path | str, RunConfig, RecordDict]] = {
        "dataset": (tmp_path / "nowhere", run, request(tiny_base, site, run)),
        "config": ("", run, request(tiny_base, site, run)),
        "size": (tiny_dataset, run, damaged),
        "model": (tiny_dataset, run, request(tiny_base, site, run, frozen="0" * 64)),
        # Training that diverges at the site, as an update that is not finite.
        "finite": (tiny_dataset, far, diverging),
    }
    for word, (dataset, asked, content) in failures.items():
        reply = ask(MessageType.TRAIN, context(dataset, asked), content)
        assert reply.has_error(), word
        assert cause.told(reply.error.code) == word, reply.error.reason


def test_an_update_says_how_often_the_sites_trainer_was_started_again(
    tiny_base: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor is real, and what it starts ends at once; the answer is a stand-in's."""
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run)
    answer = Answer(metrics={"metrics": {"loss": 0.5, "frames": 12}})
    monkeypatch.setattr("app.trainer_client.submit", lambda _: answer)
    with supervised((sys.executable, "-c", "")) as path:
        monkeypatch.setenv("VLAFLEET_TRAINER", str(path))
        end = time.monotonic() + 60
        while not restarts(path) and time.monotonic() < end:
            time.sleep(0.05)
        trained = ask(MessageType.TRAIN, context(tiny_dataset, run), content)
        times = restarts(path)
        measured = ask(MessageType.EVALUATE, context(tiny_dataset, run), content)
    metrics = dict(trained.content.metric_records["metrics"])
    assert metrics == {"loss": 0.5, "frames": 12, "trainer_restarts": metrics["trainer_restarts"]}
    assert 1 <= metrics["trainer_restarts"] <= times  # type: ignore[operator]
    assert dict(measured.content.metric_records["metrics"]) == {"loss": 0.5, "frames": 12}


def test_starting_and_describing_needs_neither_torch_nor_lerobot(
    tiny_base: Path, tiny_dataset: Path
) -> None:
    run = config(tiny_base)
    code = f"""
import json, sys
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
from app.client_app import app
node = {{"site": "site-a", "dataset": {str(tiny_dataset)!r}}}
terms = {{"lineage": "17", "config": {json.dumps(run.as_dict())!r}}}
message = Message(RecordDict({{"request": ConfigRecord(terms)}}), 1, "query")
message.metadata.__dict__["_message_id"] = "asked"
reply = app(message, Context(1, 1, node, RecordDict(), {run.as_dict()!r}))
assert not reply.has_error(), reply.error
print(json.dumps([m for m in ("torch", "lerobot", "transformers") if m in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@dataclass
class Node:
    node_id: int
    name: str


@dataclass
class RealSites:
    """Flower's Grid without its processes: messages go to the ClientApp as each site would run it."""

    contexts: list[Context]
    replies: dict[str, Message] = field(default_factory=dict)

    def get_nodes(self) -> list[Node]:
        return [Node(n, str(c.node_config["site"])) for n, c in enumerate(self.contexts)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(f"m{len(self.replies)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            where = self.contexts[message.metadata.dst_node_id]
            self.replies[ids[-1]] = client_app.app(message, where)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies[message_id] for message_id in message_ids]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in a temporary directory, and short polls."""
    monkeypatch.setenv("VLAFLEET_RUNS", str(tmp_path))
    for function in (rounds.wait_for_sites, Exchange.__init__):
        assert function.__kwdefaults__
        monkeypatch.setitem(function.__kwdefaults__, "poll_s", 0.02)


@pytest.mark.usefixtures("server")
def test_two_real_sites_learn_together_and_the_run_repeats_to_the_bit(
    tiny_base: Path, tiny_dataset: Path
) -> None:
    run = config(tiny_base, local_steps=8, learning_rate=3e-3, warmup_steps=0)
    for number in (1, 2):
        sites = [
            context(f"{tiny_dataset}#episodes=0:2", run, site="site-a"),
            context(f"{tiny_dataset}#episodes=2:4", run, site="site-b"),
        ]
        server = Context(number, 0, {}, RecordDict(), run.as_dict())
        server_app.main(RealSites(sites), server)  # type: ignore[arg-type]
    first, second = (read_rounds(runs_root() / str(number)) for number in (1, 2))
    losses = [record["aggregate"]["loss"] for record in first]
    # Eight steps at this rate take a fifth off the base's loss.
    assert max(losses[1:]) < 0.9 * losses[0]
    assert [record["model"] for record in first] == [record["model"] for record in second]
    assert losses == [record["aggregate"]["loss"] for record in second]


@pytest.mark.usefixtures("server")
def test_adapters_that_two_real_sites_trained_are_published_as_the_policy_they_measured(
    tiny_base: Path, tiny_dataset: Path
) -> None:
    from app.evaluation import evaluate

    run = config(
        tiny_base, exchange="lora", lora_rank=8, local_steps=8, learning_rate=1e-2, warmup_steps=0
    )
    uris = {f"site-{n}": f"{tiny_dataset}#episodes={n}:{n + 2}" for n in (0, 2)}
    sites = [context(uri, run, site=name) for name, uri in uris.items()]
    server_app.main(RealSites(sites), Context(1, 0, {}, RecordDict(), run.as_dict()))  # type: ignore[arg-type]
    records = read_rounds(runs_root() / "1")
    losses = [record["aggregate"]["loss"] for record in records]
    assert losses[2] < 0.95 * losses[0]
    # Of the expert nothing crosses the wire.
    values = sum(8 * sum(shape) for shape in trainables.targets(tiny_base).values())
    sent = records[1]["sites"]["site-0"]["train"]["bytes_up"]
    assert values < sent < 2 * values < sum(array.size for array in trainable(tiny_base).values())
    # As the SuperLink's own evaluation and lerobot load it: merged, without adapters.
    checkpoint = runs_root() / "1" / "checkpoints" / "latest"
    policy, processors = server_evaluation._load(checkpoint, run)
    for name, uri in uris.items():
        dataset = open_dataset(uri, held_out=run.held_out, seed=run.seed)
        found = evaluate(
            policy,
            processors,
            Frames(dataset, dataset.held_out_episodes),
            batch_size=run.batch_size,
            batches=run.eval_batches,
            seed=run.seed,
        )
        measured = records[2]["sites"][name]["evaluate"]
        assert found.loss == pytest.approx(measured["loss"], rel=1e-5)
        assert found.rmse_deg == pytest.approx(measured["rmse_deg"], rel=1e-4)


def state_of(site: str, lineage: str = "17") -> SiteState:
    # Written once the answer is handed over.
    for thread in threading.enumerate():
        if thread.name == "site-state":
            thread.join()
    return SiteState(home() / "sites" / site, lineage)


def test_a_site_keeps_moments_and_what_the_codec_left_out(
    tiny_base: Path, tiny_dataset: Path
) -> None:
    run = config(tiny_base)
    content = request(tiny_base, described(tiny_dataset, run), run)
    reply = ask(MessageType.TRAIN, context(tiny_dataset, run), content)
    kept = state_of("site-a").before(2)
    assert kept
    assert kept.optimizer
    assert kept.optimizer.step == run.local_steps
    assert kept.residual
    update = payload.from_records(reply.content, kind="update")
    left_out = sum(float(np.abs(kept.residual[name]).sum()) for name in kept.residual)
    sent = sum(float(np.abs(array).sum()) for _, array in update.items())
    assert 0 < left_out < 0.05 * sent
    # Redone after a crash of the server, the round is the same to the bit.
    again = ask(MessageType.TRAIN, context(tiny_dataset, run), content)
    assert payload.from_records(again.content, kind="update").sha256 == update.sha256
    forgetful = config(tiny_base, reset_optimizer=True, codec="fp32")
    content = request(tiny_base, described(tiny_dataset, forgetful), forgetful)
    assert not ask(MessageType.TRAIN, context(tiny_dataset, forgetful), content).has_error()
    kept = state_of("site-a").before(2)
    assert kept
    assert (kept.optimizer, kept.residual) == (None, None)


def test_the_proximal_term_is_measured_and_pulls(tiny_base: Path, tiny_dataset: Path) -> None:
    run = config(tiny_base, codec="fp32", learning_rate=1e-2, warmup_steps=0)
    norms = []
    for mu in (0.0, 100.0):
        content = request(tiny_base, described(tiny_dataset, run), run)
        content.config_records["request"]["mu"] = mu
        reply = ask(MessageType.TRAIN, context(tiny_dataset, run, site=f"site-{mu:.0f}"), content)
        metrics: dict[str, Any] = dict(reply.content.metric_records["metrics"])
        assert ("proximal_loss" in metrics) == bool(mu)
        update = payload.from_records(reply.content, kind="update")
        norms.append(sum(float(np.square(array).sum()) for _, array in update.items()))
    assert metrics["proximal_loss"] > 0
    assert norms[1] < norms[0]


def test_a_site_that_cannot_build_the_model_asks_for_the_whole_one(
    tiny_base: Path, tiny_dataset: Path
) -> None:
    run = config(tiny_base)
    site = described(tiny_dataset, run)
    own = payload.canonical_hash(trainable(tiny_base))
    assert site.held == own
    moved = {name: array + np.float32(0.5) for name, array in trainable(tiny_base).items()}
    target = payload.canonical_hash(moved)
    where = context(tiny_dataset, run)
    # A change of a model it never had, and one that leads elsewhere than announced.
    for base, announced in (("f" * 64, target), (own, "e" * 64)):
        content = request(tiny_base, site, run, number=0, base=base, target=announced)
        reply = ask(MessageType.EVALUATE, where, content)
        assert wanted(reply.content)
        assert state_of("site-a").held() is None
    # A change of the base that it has: applied, and held from then on.
    half = {name: np.full_like(array, 0.5) for name, array in moved.items()}
    content = payload.to_records(
        payload.pack(
            sorted(half.items()), kind="model", codec="int8", base=own, target=target,
            frozen=frozen_hash(tiny_base),
        )
    )  # fmt: skip
    pooled = statistics.to_bytes(site.moments).decode()
    content["request"] = terms(run, round=0, statistics=pooled)
    assert not ask(MessageType.EVALUATE, where, content).has_error()
    assert state_of("site-a").held() == target
    assert described(tiny_dataset, run).held == target


def test_training_ends_itself_at_the_deadline(tiny_base: Path, tiny_dataset: Path) -> None:
    run = config(tiny_base, round_timeout=1e-6)
    content = request(tiny_base, described(tiny_dataset, run), run)
    assert "deadline" in refusal(ask(MessageType.TRAIN, context(tiny_dataset, run), content))


def test_a_dataset_that_would_spoil_training_is_refused_when_asked(
    tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_dataset, broken)
    (broken / "meta" / "stats.json").unlink()
    video = next(broken.glob("videos/*top*/*/*.mp4"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    reason = refusal(ask(MessageType.QUERY, context(broken, config(tiny_base))))
    assert "stats.json" in reason
    assert "more: 'vlafleet data check')" in reason
