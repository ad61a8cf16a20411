"""The ClientApp: what a site does when the run asks it to describe itself, train or evaluate.

Flower starts a process for each message and importing lerobot costs it about 14 s of CPU, so this
module imports neither torch nor lerobot: a ``query`` never does, the others when they begin. What
must outlive a message lies on the site's disk (``app.site_state``).
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from app import payload, schedule, simulation
from app.broadcast import METRICS, REQUEST, want_full
from app.config import RunConfig, home, models_directory
from app.description import Description
from app.payload import Payload, PayloadError, Tensors
from app.site_state import Kept, SiteState
from app.tensorfile import WEIGHTS, Lazy
from certs.errors import ConfigError, DatasetError, FleetError, ModelError
from certs.flower import set_chunk_size

if TYPE_CHECKING:
    from app.dataset import SiteDataset

# Seconds between two progress lines: enough to see that it lives, few enough to read.
_PROGRESS_S = 5.0

_log = logging.getLogger("flwr")
app = ClientApp()

type Handler = Callable[[Message, Context], RecordDict]


class _NotHeldError(Exception):
    """The round's model cannot be built from what the site holds."""


def _answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Send an expected failure back as its sentence; Flower would log and send a traceback."""

    @functools.wraps(handler)
    def answered(message: Message, context: Context) -> Message:
        try:
            # Flower cuts the reply into chunks in this process.
            if chunk := context.node_config.get("chunk-bytes"):
                set_chunk_size(int(chunk))
            return Message(handler(message, context), reply_to=message)
        except _NotHeldError as error:
            _log.info("%s: %s; asking for the whole model", handler.__name__, error)
            return Message(want_full(), reply_to=message)
        except FleetError as error:
            _log.error("%s: %s", handler.__name__, error)
            return Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message
            )

    return answered


@app.query()
@_answer
def describe(message: Message, context: Context) -> RecordDict:
    """Check the dataset and say what this site brings to the run, without torch."""
    from app.preflight import check
    from app.statistics import moments_of

    request = _Request.of(message)
    site, dataset = _site(context, request.config)
    if findings := check(dataset):
        more = f" ({len(findings) - 1} more: 'vlafleet data check')" if findings[1:] else ""
        raise DatasetError(findings[0] + more)
    state = SiteState(home() / "sites" / site, request.lineage)
    held = state.held() or payload.canonical_hash(_base_tensors(_base(request.config)))
    return Description.of(
        site,
        dataset,
        moments_of(dataset),
        held=held,
        chunk_bytes=int(context.node_config.get("chunk-bytes", 0)),
    ).to_records()


@app.train()
@_answer
def train(message: Message, context: Context) -> RecordDict:
    """Train the round's model on this site's episodes; reply with the change and its metrics."""
    work = _prepare(message, context, "train")
    from app.training import train as train_policy

    config, scale, state = work.config, work.request.number("scale"), work.state
    kept = state.before(work.round) or Kept(None, None)
    result = train_policy(
        work.policy,
        work.processors,
        work.dataset,
        steps=config.local_steps,
        batch_size=config.batch_size,
        learning_rate=lambda step: scale * schedule.learning_rate(config, step),
        seed=config.seed,
        global_step=(work.round - 1) * config.local_steps,
        progress=_progress(work.round, config),
        proximal_mu=work.request.number("mu"),
        optimizer_state=kept.optimizer,
        # When the round is over, nobody waits for this any more.
        deadline=work.started + config.round_timeout,
    )
    parts, residual = [], {}
    for name, parameter in work.trainable.items():
        delta = parameter.detach().cpu().numpy() - work.tensors[name]
        before = kept.residual[name] if kept.residual else None
        try:
            encoded, _, residual[name] = payload.encode_feedback(delta, before, config.codec)
        except ValueError as error:
            raise PayloadError(
                "finite", f"Training diverged in tensor {name} ({error}): lower learning-rate."
            ) from error
        parts.append((name, delta.shape, encoded))
    update = payload.pack_encoded(
        parts,
        kind="update",
        codec=config.codec,
        base=work.payload.target,
        target=None,
        frozen=work.payload.frozen,
    )
    state.keep(
        work.round,
        Kept(
            None if config.reset_optimizer else result.optimizer_state,
            # fp32 leaves nothing behind.
            residual if config.codec != "fp32" else None,
        ),
    )
    records = payload.to_records(update)
    metrics: dict[str, float | int | list[float] | list[int]] = {
        "loss": float(result.mean_loss),
        "last_loss": float(result.last_loss),
        "grad_norm": float(result.grad_norm),
        "frames": int(result.frames),
        "work_seconds": float(result.seconds),
        "ready_seconds": work.ready_seconds,
    }
    if result.proximal_loss is not None:
        metrics["proximal_loss"] = float(result.proximal_loss)
    records[METRICS] = MetricRecord(metrics)
    return records


@app.evaluate()
@_answer
def evaluate(message: Message, context: Context) -> RecordDict:
    """Measure the round's model on this site's held-out episodes."""
    work = _prepare(message, context, "evaluate")
    from app.evaluation import evaluate as evaluate_policy

    config = work.config
    started = time.monotonic()
    result = evaluate_policy(
        work.policy,
        work.processors,
        work.dataset,
        batch_size=config.batch_size,
        batches=config.eval_batches,
        seed=config.seed,
    )
    metrics = MetricRecord(
        {
            "loss": float(result.loss),
            "frames": int(result.frames),
            "rmse_deg": [float(value) for value in result.rmse_deg],
            "work_seconds": time.monotonic() - started,
            "ready_seconds": work.ready_seconds,
        }
    )
    return RecordDict({METRICS: metrics})


@dataclass(frozen=True)
class _Request:
    """What a message says beside its payload."""

    config: RunConfig
    # The run as the sites know it: a resumed run keeps its name.
    lineage: str
    record: Mapping[str, Any]

    @classmethod
    def of(cls, message: Message) -> _Request:
        try:
            record: dict[str, Any] = dict(message.content.config_records[REQUEST])
            config = json.loads(record["config"])
            return cls(RunConfig.parse(config), str(record["lineage"]), record)
        except (KeyError, TypeError, ValueError) as error:
            raise PayloadError("missing", f"The request is incomplete (no {error}).") from error

    def number(self, key: str) -> float:
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PayloadError("missing", f"The request is incomplete (no {key!r}).")
        return value


@dataclass(frozen=True)
class _Work:
    """A policy that holds the round's model, and what it is to work on."""

    started: float
    request: _Request
    round: int
    dataset: SiteDataset
    state: SiteState
    payload: Payload
    # The round's model, before training; read from disk at each access.
    tensors: Tensors
    policy: Any
    processors: Any
    trainable: dict[str, Any]
    # From the message's arrival in this process until work can begin: imports and loading.
    ready_seconds: float

    @property
    def config(self) -> RunConfig:
        return self.request.config


def _prepare(message: Message, context: Context, kind: str) -> _Work:
    from app.statistics import from_bytes, normalisation

    started = time.monotonic()
    request = _Request.of(message)
    config, number = request.config, int(request.number("round"))
    # Cheap checks first: a wrong path should not cost the import of lerobot.
    site, dataset = _site(context, config)
    statistics = normalisation(from_bytes(str(request.record.get("statistics")).encode()))
    model = payload.from_records(message.content, kind="model")
    base = _base(config, model.frozen)
    state = SiteState(home() / "sites" / site, request.lineage)
    tensors = _model(model, state, base)

    import torch

    torch.set_num_threads(config.threads)
    from app.policy import load_policy, load_processors, trainable_tensors

    policy = load_policy(base, _device(context))
    trainable = trainable_tensors(policy)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.tensor(tensors[name]))
    processors = load_processors(base, policy, statistics)
    ready = time.monotonic() - started
    _log.info("round %d/%d %s: ready after %.1f s", number, config.rounds, kind, ready)
    return _Work(
        started, request, number, dataset, state, model, tensors, policy, processors, trainable,
        ready,
    )  # fmt: skip


def _model(model: Payload, state: SiteState, base: Path) -> Tensors:
    """The round's model, from the payload and what the site holds; kept for the next round."""
    own = _base_tensors(base)
    held = state.held()
    if held == model.target and held:
        return state.model()
    source: Tensors = own
    if model.base is None:
        payload.check_tensors(model.shapes, own.shapes)
    elif model.base == held:
        source = state.model()
    elif model.base != payload.canonical_hash(own):
        raise _NotHeldError(f"model {model.base[:12]} is not here")
    if model.base == model.target:
        return source
    tensors = dict(payload.apply(source, model))
    if (found := payload.canonical_hash(tensors)) != model.target:
        raise _NotHeldError(f"model {found[:12]} came out, not {str(model.target)[:12]}")
    state.keep_model(found, own.shapes, tensors.items())
    # From disk again: while it trains, a site's memory is for the policy.
    return state.model()


def _base(config: RunConfig, frozen: str | None = None) -> Path:
    """The base model's directory; ``ModelError`` when its frozen tensors are not ``frozen``."""
    from app.policy import frozen_hash, resolve_model

    base = resolve_model(config.model, models_directory())
    if frozen is not None and (own := frozen_hash(base)) != frozen:
        raise ModelError(
            f"The frozen tensors of model {config.model!r} at this site ({own[:12]}) are not "
            f"the federation's ({frozen[:12]}): install the same model at every site."
        )
    return base


def _base_tensors(base: Path) -> Lazy:
    from app.policy import trainable_names

    return Lazy(base / WEIGHTS, trainable_names(base))


def _site(context: Context, config: RunConfig) -> tuple[str, SiteDataset]:
    """This site's name and its dataset."""
    from app.dataset import open_dataset

    simulated = simulation.site_of(context.node_config, config.as_dict())
    site, uri = simulated or (_text(context, "site"), _text(context, "dataset"))
    return site, open_dataset(uri, held_out=config.held_out, seed=config.seed)


def _text(context: Context, key: str) -> str:
    value = context.node_config.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"This site's node config has no {key!r}: start its SuperNode with "
            "'vlafleet supernode --dataset URI'."
        )
    return value


def _device(context: Context) -> str:
    import torch

    if "device" in context.node_config:
        return _text(context, "device")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress(number: int, config: RunConfig) -> Callable[[int, float], None]:
    last = time.monotonic()

    def progress(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if step == config.local_steps or now - last >= _PROGRESS_S:
            last = now
            _log.info(
                "round %d/%d train: step %d/%d, loss %.3f",
                number,
                config.rounds,
                step,
                config.local_steps,
                loss,
            )

    return progress
