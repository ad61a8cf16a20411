"""The ClientApp: what a site does when the run asks it to describe itself, train or evaluate.

Flower starts a process for each message and importing lerobot costs it about 14 s of CPU, so this
module imports neither torch nor lerobot: a ``query`` never does, the others when they begin.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from app import payload
from app.config import RunConfig, learning_rate, models_directory
from app.description import Description
from app.payload import PayloadError, Tensors
from certs.errors import ConfigError, FleetError, ModelError

if TYPE_CHECKING:
    from app.dataset import SiteDataset

# The record of a request that says which round it is, and of a reply that carries its metrics.
REQUEST = "request"
METRICS = "metrics"
# Seconds between two progress lines: enough to see that it lives, few enough to read.
_PROGRESS_S = 5.0

_log = logging.getLogger("flwr")
app = ClientApp()

type Handler = Callable[[Message, Context], RecordDict]


def _answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Send an expected failure back as its sentence; Flower would log and send a traceback."""

    @functools.wraps(handler)
    def answered(message: Message, context: Context) -> Message:
        try:
            return Message(handler(message, context), reply_to=message)
        except FleetError as error:
            _log.error("%s: %s", handler.__name__, error)
            return Message(
                Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message
            )

    return answered


@app.query()
@_answer
def describe(_: Message, context: Context) -> RecordDict:
    """Say what this site brings to the run, without torch."""
    from app.statistics import moments_of

    site = _text(context, "site")
    dataset = _dataset(context, RunConfig.parse(context.run_config))
    return Description.of(site, dataset, moments_of(dataset)).to_records()


@app.train()
@_answer
def train(message: Message, context: Context) -> RecordDict:
    """Train the round's model on this site's episodes; reply with the change and its metrics."""
    work = _prepare(message, context, "train")
    from app.training import train as train_policy

    config = work.config
    result = train_policy(
        work.policy,
        work.processors,
        work.dataset,
        steps=config.local_steps,
        batch_size=config.batch_size,
        learning_rate=functools.partial(learning_rate, config),
        seed=config.seed,
        global_step=(work.round - 1) * config.local_steps,
        progress=_progress(work.round, config),
    )
    delta: Tensors = {
        name: parameter.detach().cpu().numpy() - work.model.tensors[name]
        for name, parameter in work.trainable.items()
    }
    records = payload.to_records(
        *payload.pack(delta, kind="delta", base=work.model.base, frozen=work.model.frozen)
    )
    records[METRICS] = MetricRecord(
        {
            "loss": float(result.mean_loss),
            "last_loss": float(result.last_loss),
            "grad_norm": float(result.grad_norm),
            "frames": int(result.frames),
            "work_seconds": float(result.seconds),
            "ready_seconds": work.ready_seconds,
        }
    )
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
class _Work:
    """A policy that holds the round's model, and what it is to work on."""

    config: RunConfig
    round: int
    dataset: SiteDataset
    model: payload.Payload
    policy: Any
    processors: Any
    trainable: dict[str, Any]
    # From the message's arrival in this process until work can begin: imports and loading.
    ready_seconds: float


def _prepare(message: Message, context: Context, kind: str) -> _Work:
    started = time.monotonic()
    config = RunConfig.parse(context.run_config)
    # Cheap checks first: a wrong path should not cost the import of lerobot.
    dataset = _dataset(context, config)
    number, statistics = _request(message)
    model = payload.from_records(message.content, kind="model")
    base = _base(config, model)

    import torch

    torch.set_num_threads(config.threads)
    from app.policy import load_policy, load_processors, trainable_tensors

    policy = load_policy(base, _device(context))
    trainable = trainable_tensors(policy)
    payload.check_tensors(model.tensors, trainable)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.tensor(model.tensors[name]))
    processors = load_processors(base, policy, statistics)
    ready = time.monotonic() - started
    _log.info("round %d/%d %s: ready after %.1f s", number, config.rounds, kind, ready)
    return _Work(config, number, dataset, model, policy, processors, trainable, ready)


def _base(config: RunConfig, model: payload.Payload) -> Path:
    from app.policy import frozen_hash, resolve_model

    base = resolve_model(config.model, models_directory())
    frozen = frozen_hash(base)
    if frozen != model.frozen:
        raise ModelError(
            f"The frozen tensors of model {config.model!r} at this site ({frozen[:12]}) are not "
            f"the federation's ({model.frozen[:12]}): install the same model at every site."
        )
    return base


def _request(message: Message) -> tuple[int, Any]:
    from app.statistics import from_bytes, normalisation

    try:
        record: dict[str, Any] = dict(message.content.config_records[REQUEST])
        return int(record["round"]), normalisation(from_bytes(record["statistics"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError("missing", f"The request is incomplete (no {error}).") from error


def _dataset(context: Context, config: RunConfig) -> SiteDataset:
    from app.dataset import open_dataset

    return open_dataset(_text(context, "dataset"), held_out=config.held_out, seed=config.seed)


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
