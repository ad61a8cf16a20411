"""What a site does when the run asks it to describe itself, train or evaluate: one job after another.

Neither torch nor lerobot is imported before the first job that needs them: importing lerobot takes
8 to 18 s, and a description does without.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app import payload, schedule, simulation, trainables
from app.config import RunConfig, home, models_directory
from app.description import RECORD, Description
from app.job import METRICS, WANT_FULL, Answer, Job, Progress
from app.payload import Payload, PayloadError, Tensors
from app.site_state import Kept, SiteState
from certs.errors import ConfigError, DatasetError, ModelError
from certs.link import CHUNK_BYTES

if TYPE_CHECKING:
    from app.dataset import SiteDataset

# Seconds between two progress lines: enough to see that it lives, few enough to read.
_PROGRESS_S = 5.0

_log = logging.getLogger("flwr")


class _NotHeldError(Exception):
    """The round's model cannot be built from what the site holds."""


class Worker:
    """Answers a site's jobs, one at a time; what they need stays loaded for the next one."""

    def __init__(self) -> None:
        self._resident = Resident()

    def handle(self, job: Job, progress: Progress) -> Answer:
        """The answer to a job; ``FleetError`` when it cannot be done, and whatever ``progress`` raises."""
        try:
            match job.kind:
                case "describe":
                    return self._describe(job)
                case "train":
                    return self._train(job, progress)
                case "evaluate":
                    return self._evaluate(job, progress)
        except _NotHeldError as error:
            _log.info("%s: %s; asking for the whole model", job.kind, error)
            return WANT_FULL

    def close(self) -> None:
        """Finish what is being written, and give all memory back."""
        self._resident.close()

    def _describe(self, job: Job) -> Answer:
        """Check the dataset and say what this site brings to the run, without torch."""
        from app.preflight import check
        from app.statistics import moments_of

        request = _Request.of(job)
        config, lineage = request.config, request.lineage
        name, uri, _ = _place(job, config)
        dataset = self._resident.site(name, uri, config, lineage).dataset
        if findings := check(dataset):
            more = f" ({len(findings) - 1} more: 'vlafleet data check')" if findings[1:] else ""
            raise DatasetError(findings[0] + more)
        held = self._resident.state(name, lineage).held()
        described = Description.of(
            name,
            dataset,
            moments_of(dataset),
            held=held or self._resident.base(config, lineage).hash,
            chunk_bytes=int(job.node.get(CHUNK_BYTES, 0)),
        )
        return Answer(configs={RECORD: described.record()})

    def _train(self, job: Job, progress: Progress) -> Answer:
        """Train the round's model on this site's episodes; the answer is the change and its metrics."""
        work = self._prepare(job, progress)
        from app.training import train

        config, model = work.config, work.model
        loader = work.site.loader(model, config, work.request.statistics, work.caching)
        scale, kept = work.request.number("scale"), work.state.before(work.round)
        ready = work.ready()
        model.train()
        result = train(
            model.policy,
            loader,
            steps=config.local_steps,
            batch_size=config.batch_size,
            learning_rate=lambda step: scale * schedule.learning_rate(config, step),
            seed=config.seed,
            global_step=(work.round - 1) * config.local_steps,
            progress=work.stepping(),
            micro_batch=config.micro_batch,
            compiled=config.compile,
            proximal_mu=work.request.number("mu"),
            optimizer_state=kept.optimizer if kept else None,
            deadline=work.deadline,
        )
        update, residual = _update(work, kept.residual if kept else None)
        after = Kept(None if config.reset_optimizer else result.optimizer_state, residual)
        work.state.later(partial(work.state.keep, work.round, after))
        if work.simulated:
            # Another process of the simulation may have this site next.
            work.state.settle()
        metrics: dict[str, float | int] = {
            "loss": float(result.mean_loss),
            "last_loss": float(result.last_loss),
            "grad_norm": float(result.grad_norm),
            "frames": int(result.frames),
            "work_seconds": float(result.seconds),
            "ready_seconds": ready,
        }
        if result.proximal_loss is not None:
            metrics["proximal_loss"] = float(result.proximal_loss)
        return Answer(metrics={METRICS: metrics}, payload=update)

    def _evaluate(self, job: Job, progress: Progress) -> Answer:
        """Measure the round's model on this site's held-out episodes."""
        work = self._prepare(job, progress)
        from app.evaluation import evaluate

        config, statistics = work.config, work.request.statistics
        cache = work.site.cache("held_out", work.model, config, statistics, work.caching)
        ready, started = work.ready(), time.monotonic()
        result = evaluate(
            work.model.policy,
            work.model.processors(statistics),
            work.site.frames("held_out"),
            batch_size=config.batch_size,
            batches=config.eval_batches,
            seed=config.seed,
            cache=cache,
        )
        metrics = {
            "loss": float(result.loss),
            "frames": int(result.frames),
            "rmse_deg": [float(value) for value in result.rmse_deg],
            "work_seconds": time.monotonic() - started,
            "ready_seconds": ready,
        }
        return Answer(metrics={METRICS: metrics})

    def _prepare(self, job: Job, progress: Progress) -> _Work:
        """Load what differs from the last job's, and let the policy hold the round's model."""
        started = time.monotonic()
        request = _Request.of(job)
        config, lineage = request.config, request.lineage
        number = int(request.number("round"))
        if job.payload is None:
            raise PayloadError("missing", "The message carries no payload.")
        # Cheap checks first: a wrong path should not cost the import of lerobot.
        name, uri, simulated = _place(job, config)
        site = self._resident.site(name, uri, config, lineage)
        state = self._resident.state(name, lineage)
        from_bytes(request.statistics.encode())
        base = self._resident.base(config, lineage)
        if base.frozen != job.payload.frozen:
            raise ModelError(
                f"The frozen tensors of model {config.model!r} at this site ({base.frozen[:12]}) are not "
                f"the federation's ({job.payload.frozen[:12]}): install the same model at every site."
            )
        tensors = _tensors(job.payload, state, base)

        import torch

        torch.set_num_threads(config.threads)
        model = self._resident.model(config, base, _device(job))
        model.hold(str(job.payload.target), tensors)
        return _Work(
            started, job, request, number, site, state, model, tensors, job.payload, simulated, progress
        )


@dataclass(frozen=True)
class _Request:
    """What a message says beside its payload."""

    config: RunConfig
    # The run as the sites know it: a resumed run keeps its name.
    lineage: str
    record: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job) -> _Request:
        try:
            config = json.loads(job.request["config"])
            return cls(RunConfig.parse(config), str(job.request["lineage"]), job.request)
        except (KeyError, TypeError, ValueError) as error:
            raise PayloadError("missing", f"The request is incomplete (no {error}).") from error

    @property
    def statistics(self) -> str:
        return str(self.record.get("statistics"))

    def number(self, key: str) -> float:
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PayloadError("missing", f"The request is incomplete (no {key!r}).")
        return value


@dataclass(frozen=True)
class _Work:
    """A policy that holds the round's model, and what it is to work on."""

    started: float
    job: Job
    request: _Request
    round: int
    site: Site
    state: SiteState
    model: Model
    # The round's model, before training; read from disk at each access.
    tensors: Tensors
    payload: Payload
    simulated: bool
    progress: Progress

    @property
    def config(self) -> RunConfig:
        return self.request.config

    @property
    def deadline(self) -> float:
        """When the round is over, nobody waits for this any more."""
        return self.started + self.config.round_timeout

    def ready(self) -> float:
        """Seconds from the job's arrival until now, when work begins."""
        seconds = time.monotonic() - self.started
        self._log("ready after %.1f s", seconds)
        return seconds

    def caching(self, done: int, total: int) -> None:
        """The prefixes of so many frames are there."""
        self.progress(kind=self.job.kind, cached=done, frames=total)
        if time.monotonic() >= self.deadline:
            raise RunFailedError(
                f"The round's deadline passed after {done} of {total} frames went into this site's prefix "
                "cache: it goes on for the next round; raise round-timeout to wait for it."
            )
        self._log("prefix cache: %d of %d frames", done, total)


@dataclass(frozen=True)
class _Request:
    """What a message says beside its payload."""

    config: RunConfig
    # The run as the sites know it: a resumed run keeps its name.
    lineage: str
    record: Mapping[str, Any]

    @classmethod
    def of(cls, job: Job) -> _Request:
        try:
            config = json.loads(job.request["config"])
            return cls(RunConfig.parse(config), str(job.request["lineage"]), job.request)
        except (KeyError, TypeError, ValueError) as error:
            raise PayloadError("missing", f"The request is incomplete (no {error}).") from error

    def number(self, key: str) -> float:
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PayloadError("missing", f"The request is incomplete (no {key!r}).")
        return value


@dataclass(frozen=True)
class _Site:
    """A site's name, its dataset, and what it keeps."""

    name: str
    dataset: SiteDataset
    state: SiteState

    @classmethod
    def of(cls, job: Job, request: _Request) -> _Site:
        from app.dataset import open_dataset

        config = request.config
        simulated = simulation.site_of(job.node, config.as_dict())
        name, uri = simulated or (_text(job, "site"), _text(job, "dataset"))
        dataset = open_dataset(uri, held_out=config.held_out, seed=config.seed)
        return cls(name, dataset, SiteState(home() / "sites" / name, request.lineage))


@dataclass(frozen=True)
class _Work:
    """A policy that holds the round's model, and what it is to work on."""

    started: float
    request: _Request
    round: int
    site: _Site
    payload: Payload
    # The round's model, before training; read from disk at each access.
    tensors: Tensors
    policy: Any
    processors: Any
    trainable: dict[str, Any]
    # From the job's arrival until work can begin: imports and loading.
    ready_seconds: float

    @property
    def config(self) -> RunConfig:
        return self.request.config


def _prepare(job: Job) -> _Work:
    from app.statistics import from_bytes, normalisation

    started = time.monotonic()
    request = _Request.of(job)
    config, number = request.config, int(request.number("round"))
    if job.payload is None:
        raise PayloadError("missing", "The message carries no payload.")
    # Cheap checks first: a wrong path should not cost the import of lerobot.
    site = _Site.of(job, request)
    statistics = normalisation(from_bytes(str(request.record.get("statistics")).encode()))
    base = _base(config, job.payload.frozen)
    tensors = _model(job.payload, site.state, trainables.initial(config, base))

    import torch

    torch.set_num_threads(config.threads)
    from app.policy import load_policy, load_processors, trainable_tensors

    policy = load_policy(base, _device(job))
    trainable = trainable_tensors(policy)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.tensor(tensors[name]))
    processors = load_processors(base, policy, statistics)
    ready = time.monotonic() - started
    _log.info("round %d/%d %s: ready after %.1f s", number, config.rounds, job.kind, ready)
    return _Work(
        started, request, number, site, job.payload, tensors, policy, processors, trainable, ready
    )


def _model(model: Payload, state: SiteState, own: Tensors) -> Tensors:
    """The round's model, from the payload and what the site holds; kept for the next round."""
    held = state.held()
    if held == model.target and held:
        return state.model()
    source = own
    shapes = {name: array.shape for name, array in own.items()}
    if model.base is None:
        payload.check_tensors(model.shapes, shapes)
    elif model.base == held:
        source = state.model()
    elif model.base != payload.canonical_hash(own):
        raise _NotHeldError(f"model {model.base[:12]} is not here")
    if model.base == model.target:
        return source
    tensors = dict(payload.apply(source, model))
    if (found := payload.canonical_hash(tensors)) != model.target:
        raise _NotHeldError(f"model {found[:12]} came out, not {str(model.target)[:12]}")
    state.keep_model(found, shapes, tensors.items())
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


def _text(job: Job, key: str) -> str:
    value = job.node.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"This site's node config has no {key!r}: start its SuperNode with "
            "'vlafleet supernode --dataset URI'."
        )
    return value


def _device(job: Job) -> str:
    import torch

    if "device" in job.node:
        return _text(job, "device")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _report(number: int, config: RunConfig, progress: Progress) -> Callable[[int, float], None]:
    """Log a line every few seconds and at the last step, and tell ``progress`` of every step."""
    last = time.monotonic()

    def report(step: int, loss: float) -> None:
        nonlocal last
        progress(
            kind="train",
            round=number,
            rounds=config.rounds,
            step=step,
            steps=config.local_steps,
            loss=loss,
        )
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

    return report
