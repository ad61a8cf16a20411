"""What the resident trainer tells Prometheus about its work."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Info,
    ProcessCollector,
    Summary,
    generate_latest,
)

from certs import site_metrics as said
from certs.metric import Metric

type Result = Literal["completed", "error", "cancelled", "failed", "broken"]

# What a job may say of its progress, and the metric that tells it.
_PROGRESS = {
    "round": said.ROUND,
    "step": said.STEP,
    "steps": said.STEPS,
    "loss": said.LOSS,
    "samples_per_second": said.RATE,
    "cached": said.CACHED,
    "frames": said.FRAMES,
    "data_wait": said.WAIT,
}


@dataclass
class Outcome:
    """How a job ended; set before its context ends."""

    result: Result = "failed"


class Metrics:
    """A registry of its own; all names start with ``vlafleet_trainer_``."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        # Memory, CPU seconds, open files and start time of this process.
        ProcessCollector(namespace="vlafleet_trainer", registry=self._registry)
        self._progress = {name: self._gauge(metric) for name, metric in _PROGRESS.items()}
        self._forget()
        episodes, frames = self._gauge(said.EPISODES), self._gauge(said.DATASET_FRAMES)
        # Of the dataset: true until another job says something else.
        self._dataset = {
            "train_episodes": (episodes, "train"),
            "held_out_episodes": (episodes, "held_out"),
            "train_frames": (frames, "train"),
            "held_out_frames": (frames, "held_out"),
        }
        self._cache = Info(said.CACHE.name, said.CACHE.help, registry=self._registry)
        self._cache.info({"tier": "none"})
        self._jobs = said.JOBS.counting(self._registry)
        self._seconds = Summary(
            said.JOB_SECONDS.name,
            said.JOB_SECONDS.help,
            said.JOB_SECONDS.labels,
            registry=self._registry,
        )
        self._busy = self._gauge(said.BUSY)
        self.waiting = self._gauge(said.WAITING)
        self._gauge(said.TORCH_MEMORY).set_function(_gpu_memory)

    def progress(self, values: Mapping[str, float | int | str]) -> None:
        """Note what a job says of its progress; what has no metric is left out."""
        for name, value in values.items():
            if name in self._progress:
                self._progress[name].set(float(value))
            elif name in self._dataset:
                gauge, part = self._dataset[name]
                gauge.labels(part).set(float(value))
        if "cache_tier" in values:
            self._cache.info({"tier": str(values["cache_tier"])})

    @contextlib.contextmanager
    def job(self, kind: str) -> Iterator[Outcome]:
        """Measure one job."""
        outcome = Outcome()
        # What the job before said is not true of this one.
        self._forget()
        with self._busy.track_inprogress(), self._seconds.labels(kind).time():
            yield outcome
        self._jobs.labels(kind, outcome.result).inc()

    def text(self) -> str:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry).decode()

    def _forget(self) -> None:
        for gauge in self._progress.values():
            gauge.set(math.nan)

    def _gauge(self, metric: Metric) -> Gauge:
        return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)


def _gpu_memory() -> float:
    # The job that needs a GPU imports torch; a reader of metrics does not.
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())))
