"""What a site does when the run asks it to describe itself, train or evaluate: one job after another.

Neither torch nor lerobot is imported before the first job that needs them: importing lerobot takes
8 to 18 s, and a description does without.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from app import payload, schedule, simulation
from app.config import RunConfig
from app.dataset import SiteDataset
from app.description import RECORD, Description
from app.job import METRICS, WANT_FULL, Answer, Job, Progress
from app.machine import Machine
from app.payload import Payload, PayloadError, Tensors
from app.resident import Base, Model, Part, Resident, Site
from app.site_state import Kept, SiteState
from app.statistics import from_bytes
from certs import logs
from certs.errors import ConfigError, DatasetError, ModelError, RunFailedError
from certs.link import CHUNK_BYTES

if TYPE_CHECKING:
    from app.prefix_cache import PrefixCache

# Seconds between two lines of a job's progress: enough to see that it lives, few enough to read.
_LINES_S = 5.0

_log = logging.getLogger("flwr")


class _NotHeldError(Exception):
    """The round's model cannot be built from what the site holds."""


class Worker:
    """Answers a site's jobs, one at a time; what they need stays loaded for the next one, if any (``brief``)."""

    def __init__(self, *, brief: bool = False) -> None:
        self._resident = Resident(brief=brief)

    def handle(self, job: Job, progress: Progress) -> Answer:
        """The answer to a job; ``FleetError`` when it cannot be done, and whatever ``progress`` raises."""
        try:
            if job.kind == "describe":
                return self._describe(job, progress)
            work = self._begin(job, progress)
            return self._train(work) if job.kind == "train" else self._evaluate(work)
        except _NotHeldError as error:
            _log.info("%s: %s; asking for the whole model", job.kind, error)
            return WANT_FULL

    def settle(self) -> None:
        """Wait until what the last job leaves for the next one is on disk; ``StorageError`` when it cannot be."""
        self._resident.settle()

    def close(self) -> None:
        """Finish what is being written, and give all memory back."""
        self._resident.close()

    def _describe(self, job: Job, progress: Progress) -> Answer:
        """Check the dataset and say what this site brings to the run, without torch."""
        from app.preflight import check
        from app.statistics import moments_of

        request = _Request.of(job)
        config, lineage = request.config, request.lineage
        name, uri = _place(job, config)
        # Until the next job: what is said after this one, of its end or its failure, is of this one.
        logs.bind(site=name, run=lineage, round=None)
        dataset = self._resident.site(name, uri, config, lineage).dataset
        _show(dataset, progress)
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

    def _begin(self, job: Job, progress: Progress) -> _Work:
        """Load what differs from the last job's, and let the policy hold the round's model."""
        started = time.monotonic()
        request = _Request.of(job)
        config, lineage = request.config, request.lineage
        number = int(request.number("round"))
        if job.payload is None:
            raise PayloadError("missing", "The message carries no payload.")
        # Cheap checks first: a wrong path should not cost the import of lerobot.
        name, uri = _place(job, config)
        logs.bind(site=name, run=lineage, round=number)
        site = self._resident.site(name, uri, config, lineage)
        _show(site.dataset, progress)
        state = self._resident.state(name, lineage)
        from_bytes(request.statistics.encode())
        base = self._resident.base(config, lineage)
        if base.frozen != job.payload.frozen:
            raise ModelError(
                f"The frozen tensors of model {config.model!r} at this site ({base.frozen[:12]}) "
                f"are not the federation's ({job.payload.frozen[:12]}): install the same model at "
                "every site."
            )
        tensors = _tensors(job.payload, state, base)
        target = str(job.payload.target)

        import torch

        torch.set_num_threads(config.threads)
        model = self._resident.model(config, base, _device(job))
        model.hold(target, tensors)
        if target not in (state.held(), base.hash):
            # For the next round; the answer need not wait for the disk.
            state.later(partial(state.keep_model, target, base.initial.shapes, tensors.items()))
        return _Work(job, request, number, started, progress, site, state, model, job.payload)

    def _train(self, work: _Work) -> Answer:
        """Train the round's model on this site's episodes; the answer is the change and its metrics."""
        from app.training import train

        config, model, request = work.config, work.model, work.request
        cache = work.cache("train")
        loader = work.site.loader(model, request.statistics, cache)
        scale, mu = request.number("scale"), request.number("mu")
        kept = work.state.before(work.round) or Kept(None, None)
        ready = work.ready()
        model.change()
        machine = Machine(loader.device)

        def stepping(step: int, loss: float, rate: float, waited: float) -> None:
            machine.look()
            work.stepping(step, loss, rate, waited)

        result = train(
            model.policy,
            loader,
            steps=config.local_steps,
            batch_size=config.batch_size,
            learning_rate=lambda step: scale * schedule.learning_rate(config, step),
            seed=config.seed,
            global_step=(work.round - 1) * config.local_steps,
            progress=stepping,
            micro_batch=config.micro_batch,
            compiled=config.compile,
            proximal_mu=mu,
            optimizer_state=kept.optimizer,
            deadline=work.deadline,
        )
        update, residual = _update(work, kept.residual)
        after = Kept(None if config.reset_optimizer else result.optimizer_state, residual)
        work.state.later(partial(work.state.keep, work.round, after))
        metrics: dict[str, float | int] = {
            "loss": float(result.mean_loss),
            "last_loss": float(result.last_loss),
            "grad_norm": float(result.grad_norm),
            "frames": int(result.frames),
            "work_seconds": float(result.seconds),
            "ready_seconds": ready,
            "samples_per_second": result.frames / result.seconds,
            "data_wait": result.waited / result.seconds,
            **machine.figures(),
        }
        if result.proximal_loss is not None:
            metrics["proximal_loss"] = float(result.proximal_loss)
        return Answer(metrics={METRICS: metrics}, payload=update)

    def _evaluate(self, work: _Work) -> Answer:
        """Measure the round's model on this site's held-out episodes."""
        from app.evaluation import evaluate

        config, statistics = work.config, work.request.statistics
        cache = work.cache("held_out")
        ready, started = work.ready(), time.monotonic()
        result = evaluate(
            work.model.policy,
            work.model.processors(statistics),
            work.site.frames("held_out"),
            batch_size=config.batch_size,
            batches=config.eval_batches,
            seed=config.seed,
            cache=cache,
            progress=work.measuring,
        )
        metrics = {
            "loss": float(result.loss),
            "frames": int(result.frames),
            "rmse_deg": [float(value) for value in result.rmse_deg],
            "work_seconds": time.monotonic() - started,
            "ready_seconds": ready,
        }
        return Answer(metrics={METRICS: metrics})


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
        """The run's pooled statistics, as they were sent."""
        return str(self.record.get("statistics"))

    def number(self, key: str) -> float:
        value = self.record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PayloadError("missing", f"The request is incomplete (no {key!r}).")
        return value


@dataclass
class _Work:
    """A job, and a policy that holds its round's model."""

    job: Job
    request: _Request
    round: int
    started: float
    progress: Progress
    site: Site
    state: SiteState
    model: Model
    payload: Payload
    _told: float = field(default_factory=time.monotonic)

    @property
    def config(self) -> RunConfig:
        return self.request.config

    def tensors(self) -> Tensors:
        """The round's model, before training; read from disk at each access."""
        self.state.settle()
        held = self.state.held() == self.payload.target
        return self.state.model() if held else self.model.base.initial

    @property
    def deadline(self) -> float:
        """When the round is over, nobody waits for this any more."""
        return self.started + self.config.round_timeout

    def ready(self) -> float:
        """Seconds from the job's arrival until now, when work begins."""
        seconds = time.monotonic() - self.started
        self._say(f"ready after {seconds:.1f} s", now=True)
        return seconds

    def cache(self, part: Part) -> PrefixCache:
        """The prefixes of the site's training frames, or of its held-out ones."""
        statistics = self.request.statistics
        cache = self.site.cache(part, self.model, self.config, statistics, self._caching)
        self.progress(kind=self.job.kind, cache_tier=cache.tier)
        return cache

    def _caching(self, done: int, total: int) -> None:
        """So many frames have their prefix."""
        self.progress(kind=self.job.kind, cached=done, frames=total)
        if time.monotonic() >= self.deadline:
            raise RunFailedError(
                f"The round's deadline passed with {done} of {total} frames in this site's prefix "
                "cache, which the next round finds further on: raise round-timeout to wait for it."
            )
        if total:
            self._say(f"prefix cache: frame {done}/{total}")

    def measuring(self, done: int, total: int) -> None:
        """So many held-out frames are evaluated."""
        self.progress(kind="evaluate", evaluated=done, frames=total)
        if done < total and time.monotonic() >= self.deadline:
            raise RunFailedError(
                f"The round's deadline passed after {done} of {total} held-out frames at this "
                "site: raise round-timeout or lower eval-batches."
            )
        self._say(f"frame {done}/{total}")

    def stepping(self, step: int, loss: float, rate: float, waited: float) -> None:
        """A training step is done; ``rate`` in samples a second, ``waited`` the share of waiting for data."""
        steps = self.config.local_steps
        self.progress(
            kind="train",
            round=self.round,
            rounds=self.config.rounds,
            step=step,
            steps=steps,
            loss=loss,
            samples_per_second=rate,
            data_wait=waited,
        )
        self._say(f"step {step}/{steps}, loss {loss:.3f}", now=step == steps)

    def _say(self, text: str, *, now: bool = False) -> None:
        """Log a line, at most every few seconds unless ``now``."""
        moment = time.monotonic()
        if now or moment - self._told >= _LINES_S:
            self._told = moment
            _log.info("round %d/%d %s: %s", self.round, self.config.rounds, self.job.kind, text)


def _update(work: _Work, residual: Tensors | None) -> tuple[Payload, Tensors | None]:
    """What training changed, encoded with error feedback, and the residual that it leaves."""
    codec, tensors, parts, left = work.config.codec, work.tensors(), [], {}
    for name, parameter in work.model.trainable.items():
        delta = parameter.detach().cpu().numpy() - tensors[name]
        before = residual[name] if residual else None
        try:
            encoded, _, left[name] = payload.encode_feedback(delta, before, codec)
        except ValueError as error:
            raise PayloadError(
                "finite", f"Training diverged in tensor {name} ({error}): lower learning-rate."
            ) from error
        parts.append((name, delta.shape, encoded))
    packed = payload.pack_encoded(
        parts,
        kind="update",
        codec=codec,
        base=work.payload.target,
        target=None,
        frozen=work.payload.frozen,
    )
    # fp32 leaves nothing behind.
    return packed, left if codec != "fp32" else None


def _tensors(model: Payload, state: SiteState, base: Base) -> Tensors:
    """The round's model, from the payload and what the site holds."""
    held = state.held()
    if held == model.target and held:
        return state.model()
    source: Tensors = base.initial
    if model.base is None:
        payload.check_tensors(model.shapes, base.initial.shapes)
    elif model.base == held:
        source = state.model()
    elif model.base != base.hash:
        raise _NotHeldError(f"model {model.base[:12]} is not here")
    if model.base == model.target:
        return source
    tensors = dict(payload.apply(source, model))
    if (found := payload.canonical_hash(tensors)) != model.target:
        raise _NotHeldError(f"model {found[:12]} came out, not {str(model.target)[:12]}")
    return tensors


def _show(dataset: SiteDataset, progress: Progress) -> None:
    """Tell who follows the job what there is to train on."""
    progress(
        train_episodes=len(dataset.train_episodes),
        train_frames=dataset.frames(dataset.train_episodes),
        held_out_episodes=len(dataset.held_out_episodes),
        held_out_frames=dataset.frames(dataset.held_out_episodes),
    )


def _place(job: Job, config: RunConfig) -> tuple[str, str]:
    """The site's name, and its dataset's URI."""
    simulated = simulation.site_of(job.node, config.as_dict())
    return simulated or (_text(job, "site"), _text(job, "dataset"))


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
