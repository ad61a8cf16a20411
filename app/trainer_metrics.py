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
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    Summary,
    generate_latest,
)

type Result = Literal["completed", "error", "cancelled", "failed", "broken"]

# What a job may say of its progress, the metric's name, and what it is.
_PROGRESS = {
    "round": ("round", "The round of the job that was last reported."),
    "step": ("step", "The training step that was last reported."),
    "steps": ("steps", "Training steps of a round."),
    "loss": ("loss", "The training loss that was last reported."),
    "samples_per_second": ("samples_per_second", "Frames trained on in a second."),
    "cached": ("cached_frames", "Frames whose prefix the cache has, while it is made."),
    "frames": ("frames", "Frames of the dataset that the cache is made for."),
    "data_wait": ("data_wait_ratio", "The share of training time spent waiting for data."),
}


@dataclass
class Outcome:
    """How a job ended; set before its context ends."""

    result: Result = "failed"


class Metrics:
    """A registry of its own; all names start with ``vlafleet_trainer_``."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        # Memory, CPU seconds, open files and start time of this process.
        ProcessCollector(namespace="vlafleet_trainer", registry=registry)
        self._progress = {
            said: Gauge(f"vlafleet_trainer_{name}", text, registry=registry)
            for said, (name, text) in _PROGRESS.items()
        }
        self._cache = Info(
            "vlafleet_trainer_cache", "Where the prefix cache is.", registry=registry
        )
        self._jobs = Counter(
            "vlafleet_trainer_jobs", "Jobs by kind and how they ended.", ["kind", "result"],
            registry=registry,
        )  # fmt: skip
        self._seconds = Summary(
            "vlafleet_trainer_job_seconds", "How long jobs took.", ["kind"], registry=registry
        )
        self._busy = Gauge("vlafleet_trainer_busy", "Whether a job runs.", registry=registry)
        self.waiting = Gauge(
            "vlafleet_trainer_jobs_waiting", "Jobs that wait for their turn.", registry=registry
        )
        Gauge(
            "vlafleet_trainer_gpu_memory_bytes",
            "GPU memory that torch holds in this process.",
            registry=registry,
        ).set_function(_gpu_memory)

    def progress(self, values: Mapping[str, float | int | str]) -> None:
        """Note what a job says of its progress; what has no metric is left out."""
        for name, value in values.items():
            if name in self._progress:
                self._progress[name].set(float(value))
        if "cache_tier" in values:
            self._cache.info({"tier": str(values["cache_tier"])})

    @contextlib.contextmanager
    def job(self, kind: str) -> Iterator[Outcome]:
        """Measure one job."""
        outcome = Outcome()
        # What the job before said is not true of this one.
        for gauge in self._progress.values():
            gauge.set(math.nan)
        with self._busy.track_inprogress(), self._seconds.labels(kind).time():
            yield outcome
        self._jobs.labels(kind, outcome.result).inc()

    def text(self) -> str:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry).decode()


def _gpu_memory() -> float:
    # The job that needs a GPU imports torch; a reader of metrics does not.
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return float(sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())))
