"""What a site's SuperExec reports to its SuperNode: of the trainer, the GPU, the disk, its certificate.

The SuperNode, which holds the site's keys, believes no more of a report than a number for each series that is declared
here; so the series are few, whatever the code that trains makes the SuperExec say.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from certs import process_metrics, renewal
from certs.contact import seconds_since_contact
from certs.metric import Metric
from certs.roles import Peer, Role

# A longer report is not read.
MAX_REPORT_BYTES: Final = 256 * 1024
# How often one comes, and how long it is true: what is older is not shown any more.
REPORT_SECONDS: Final = 5.0
STALE_SECONDS: Final = 30.0

# All values that a label of a report has.
VALUES: Final = {
    # app.job.Kind
    "kind": ("describe", "train", "evaluate"),
    # app.trainer_metrics.Result
    "result": ("completed", "error", "cancelled", "failed", "broken"),
    "part": ("train", "held_out"),
    # app.prefix_cache.PrefixCache.tier
    "tier": ("gpu", "memory", "disk", "embeddings", "none"),
    # NVML's number of a GPU.
    "gpu": tuple(map(str, range(16))),
    "volume": ("site",),
    "role": (Role.SUPEREXEC,),
}

TRAINER_UP = Metric(
    "vlafleet_trainer_up", "gauge", "Whether the site's trainer answers (1) or not (0)."
)
TRAINER_RESTARTS = Metric(
    "vlafleet_trainer_restarts",
    "counter",
    "How often the trainer ended and was started again, since the SuperExec started.",
)
# What a job says of its progress; NaN where it says nothing of it.
ROUND = Metric("vlafleet_trainer_round", "gauge", "The round of the job that was last reported.")
STEP = Metric("vlafleet_trainer_step", "gauge", "The training step that was last reported.")
STEPS = Metric("vlafleet_trainer_steps", "gauge", "Training steps of a round.")
LOSS = Metric("vlafleet_trainer_loss", "gauge", "The training loss that was last reported.")
RATE = Metric("vlafleet_trainer_samples_per_second", "gauge", "Frames trained on in a second.")
CACHED = Metric(
    "vlafleet_trainer_cached_frames",
    "gauge",
    "Frames whose prefix the cache has, while it is made.",
)
FRAMES = Metric(
    "vlafleet_trainer_frames", "gauge", "Frames of the dataset that the cache is made for."
)
WAIT = Metric(
    "vlafleet_trainer_data_wait_ratio",
    "gauge",
    "The share of training time spent waiting for data.",
)
EPISODES = Metric(
    "vlafleet_trainer_dataset_episodes",
    "gauge",
    "Episodes of the dataset that the last job used.",
    ["part"],
)
DATASET_FRAMES = Metric(
    "vlafleet_trainer_dataset_frames",
    "gauge",
    "Frames of the dataset that the last job used.",
    ["part"],
)
CACHE = Metric("vlafleet_trainer_cache", "info", "Where the prefix cache is.", ["tier"])
JOBS = Metric(
    "vlafleet_trainer_jobs", "counter", "Jobs by kind and how they ended.", ["kind", "result"]
)
JOB_SECONDS = Metric("vlafleet_trainer_job_seconds", "summary", "How long jobs took.", ["kind"])
BUSY = Metric("vlafleet_trainer_busy", "gauge", "Whether a job runs.")
WAITING = Metric("vlafleet_trainer_jobs_waiting", "gauge", "Jobs that wait for their turn.")
TORCH_MEMORY = Metric(
    "vlafleet_trainer_gpu_memory_bytes",
    "gauge",
    "GPU memory that torch holds in the trainer.",
)
# As prometheus_client's ProcessCollector names them.
_PROCESS = (
    Metric("vlafleet_trainer_process_cpu_seconds", "counter", "CPU time of the trainer."),
    Metric("vlafleet_trainer_process_max_fds", "gauge", "Files that the trainer may have open."),
    Metric("vlafleet_trainer_process_open_fds", "gauge", "Files that the trainer has open."),
    Metric(
        "vlafleet_trainer_process_resident_memory_bytes",
        "gauge",
        "Memory of the trainer that is in RAM.",
    ),
    Metric("vlafleet_trainer_process_start_time_seconds", "gauge", "When the trainer started."),
    Metric(
        "vlafleet_trainer_process_virtual_memory_bytes",
        "gauge",
        "Addresses that the trainer has in use.",
    ),
)
GPU_USED = Metric(
    "vlafleet_gpu_memory_used_bytes", "gauge", "GPU memory in use, by whatever process.", ["gpu"]
)
GPU_SIZE = Metric("vlafleet_gpu_memory_size_bytes", "gauge", "GPU memory that there is.", ["gpu"])
GPU_BUSY = Metric(
    "vlafleet_gpu_utilization_ratio",
    "gauge",
    "The share of the last moments in which the GPU computed.",
    ["gpu"],
)
CONTACT = Metric(
    "vlafleet_last_contact_timestamp_seconds",
    "gauge",
    "When the server last answered: the SuperLink its site, the SuperNode its superexec.",
    ["role"],
)
METRICS: Final = (
    *(each for each in list(globals().values()) if isinstance(each, Metric)),
    *_PROCESS,
)
# All that a report may hold.
REPORTED: Final = (*METRICS, *process_metrics.METRICS, *renewal.METRICS)


class ContactCollector(Collector):
    """When the server of a site's process last answered; nothing while it has not."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def describe(self) -> Iterable[Family]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current value."""
        since = seconds_since_contact(self._peer)
        if since is not None:
            family = CONTACT.gauge()
            family.add_metric([self._peer.role], time.time() - since)
            yield family
