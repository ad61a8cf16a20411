"""What the runs' records tell Prometheus: every metric of the exporter that describes a run, a round or a site in it.

Gauges describe the newest run; counters and histograms add up all runs that are still there.
"""

from __future__ import annotations

from typing import Final

from certs.metric import Metric

# Where a round is, and what comes before the first one (app.rounds.Phase, which needs Flower).
PHASES: Final = (
    "wait", "describe", "select", "dispatch", "collect", "commit", "degrade", "fail", "evaluate", "done",
)  # fmt: skip
# How a site that was asked to train ended (app.rounds.State), and while it is asked: working.
STATES: Final = ("working", "completed", "late", "timeout", "offline", "error", "invalid")
# Why a site was asked and did not contribute: its state, or that its numbers were not finite.
DROPS: Final = ("late", "timeout", "offline", "error", "invalid", "diverged")

RUN = Metric("vlafleet_run", "info", "The newest run and what it trains.",
             ("run", "model", "strategy", "exchange", "codec"))  # fmt: skip
RUN_START = Metric("vlafleet_run_start_timestamp_seconds", "gauge", "When the newest run began.")
RUN_ENDED = Metric(
    "vlafleet_run_ended", "gauge", "Whether the newest run has ended (1) or not (0)."
)
RUN_ROUNDS = Metric("vlafleet_run_rounds", "gauge", "Rounds that the newest run was asked for.")
ROUND_TIMEOUT = Metric(
    "vlafleet_run_round_timeout_seconds",
    "gauge",
    "Within what the sites must have answered in a round.",
)
ROUND = Metric(
    "vlafleet_round", "gauge", "The round that the newest run is in; 0 is the base model."
)
PHASE = Metric(
    "vlafleet_round_phase", "gauge", "Whether the round is in this phase (1) or not (0).", ["phase"]
)
PHASE_START = Metric(
    "vlafleet_round_phase_start_timestamp_seconds", "gauge", "When the round entered its phase."
)
ROUNDS = Metric(
    "vlafleet_rounds", "counter", "Rounds that are over: committed, degraded or failed.", ["result"]
)
ROUND_SITES = Metric(
    "vlafleet_round_sites", "gauge", "Sites that were asked to train in the last round that is over, by how they ended.",
    ["state"],
)  # fmt: skip
PARTICIPATION = Metric(
    "vlafleet_round_participation_ratio",
    "gauge",
    "The share of the sites asked that completed the last round.",
)
PHASE_SECONDS = Metric(
    "vlafleet_phase_duration_seconds", "histogram", "How long rounds were in a phase.", ["phase"]
)
AGGREGATION = Metric(
    "vlafleet_round_aggregation_seconds",
    "gauge",
    "How long the last round's updates took to be combined.",
)
PAYLOAD = Metric(
    "vlafleet_payload_bytes", "counter", "Bytes of models and updates, to a site (down) and from it (up).",
    ["site", "kind", "direction"],
)  # fmt: skip
TRAIN_LOSS = Metric(
    "vlafleet_train_loss", "gauge", "The mean training loss of the last round, by frames."
)
LOSS = Metric(
    "vlafleet_held_out_loss", "gauge", "The mean held-out loss of the last evaluation, by frames."
)
BASE_LOSS = Metric(
    "vlafleet_base_held_out_loss", "gauge", "The mean held-out loss of round 0, the base model."
)
BEST_LOSS = Metric(
    "vlafleet_best_held_out_loss", "gauge", "The mean held-out loss of the best round."
)
BEST_ROUND = Metric("vlafleet_best_round", "gauge", "The round with the lowest held-out loss.")
SINCE_BEST = Metric(
    "vlafleet_rounds_since_best", "gauge", "Rounds that are over since the best one."
)
CHECKPOINT = Metric(
    "vlafleet_checkpoint_timestamp_seconds", "gauge", "When the newest checkpoint was committed."
)

SITE_STATE = Metric(
    "vlafleet_site_state",
    "gauge",
    "Whether the site's last training is in this state (1) or not (0).",
    ["site", "state"],
)
SITE_DROPS = Metric(
    "vlafleet_site_drops", "counter", "Rounds that a site was asked to train in and did not contribute to.",
    ["site", "reason"],
)  # fmt: skip
SITE_TRAIN_LOSS = Metric(
    "vlafleet_site_train_loss", "gauge", "The site's training loss in its last round.", ["site"]
)
SITE_LOSS = Metric(
    "vlafleet_site_held_out_loss",
    "gauge",
    "The site's held-out loss of its last evaluation.",
    ["site"],
)
SITE_BASE_LOSS = Metric(
    "vlafleet_site_base_held_out_loss",
    "gauge",
    "The site's held-out loss of the base model.",
    ["site"],
)
SITE_BEST_LOSS = Metric(
    "vlafleet_site_best_held_out_loss", "gauge", "The site's lowest held-out loss.", ["site"]
)
SITE_NORM = Metric(
    "vlafleet_site_update_norm", "gauge", "The L2 norm of the site's last update.", ["site"]
)
SITE_FRAMES = Metric(
    "vlafleet_site_trained_frames", "counter", "Frames that the site trained on.", ["site"]
)
SITE_SECONDS = Metric(
    "vlafleet_site_round_duration_seconds", "gauge", "From the question to the site's last answer, or its end.",
    ["site", "kind"],
)  # fmt: skip
SITE_EPISODES = Metric(
    "vlafleet_site_dataset_episodes", "gauge", "Episodes of the site's dataset.", ["site", "part"]
)
SITE_DATASET_FRAMES = Metric(
    "vlafleet_site_dataset_frames", "gauge", "Frames of the site's dataset.", ["site", "part"]
)
# What a site's last completed training said of its machine: a site behind NAT has no port to be asked at.
SITE_RATE = Metric(
    "vlafleet_site_samples_per_second", "gauge", "Frames the site trained on in a second.", ["site"]
)
SITE_WAIT = Metric(
    "vlafleet_site_data_wait_ratio",
    "gauge",
    "The share of its training time that the site waited for data.",
    ["site"],
)
SITE_GPU_USED = Metric(
    "vlafleet_site_gpu_memory_used_bytes", "gauge", "GPU memory in use at the site.", ["site"]
)
SITE_GPU_SIZE = Metric(
    "vlafleet_site_gpu_memory_size_bytes", "gauge", "GPU memory that the site has.", ["site"]
)
SITE_GPU_BUSY = Metric(
    "vlafleet_site_gpu_utilization_ratio", "gauge", "How busy the site's GPU was.", ["site"]
)
SITE_RESTARTS = Metric(
    "vlafleet_site_trainer_restarts",
    "counter",
    "How often the site's trainer ended and was started again.",
    ["site"],
)
SITE_DISK_FREE = Metric(
    "vlafleet_site_disk_free_bytes", "gauge", "Free space where the site keeps its state.", ["site"]
)
SITE_DISK_SIZE = Metric(
    "vlafleet_site_disk_size_bytes",
    "gauge",
    "Size of the disk that the site keeps its state on.",
    ["site"],
)

UNREADABLE = Metric(
    "vlafleet_unreadable_runs", "gauge", "Runs whose record is damaged, or of another release."
)

METRICS: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
