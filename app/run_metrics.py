"""What the runs' records tell Prometheus: every metric of the exporter that describes a run, a round or a site in it.

Gauges describe the newest run, and one that was not measured has no sample; counters and histograms add up all runs.
A site's counters begin with 0 when it is described, so that an increase sees the first event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client.metrics_core import Metric as Family

from certs.metric import Metric

if TYPE_CHECKING:
    from app.runs_view import View
    from app.series import Record
    from app.standing import SiteStanding
    from app.totals import Totals

# Where a round is, and what comes before the first one (app.rounds.Phase, which needs Flower).
PHASES: Final = (
    "wait", "describe", "select", "dispatch", "collect", "commit", "degrade", "fail", "evaluate", "done",
)  # fmt: skip
# How a site that was asked to train ended (app.rounds.State), and while it is asked: working.
STATES: Final = ("working", "completed", "late", "timeout", "offline", "error", "invalid")
# Why a site was asked and did not contribute: its state, or that its numbers were not finite.
DROPS: Final = ("late", "timeout", "offline", "error", "invalid", "diverged")
# What became of a round.
RESULTS: Final = ("committed", "degraded", "failed")
# Phases that take time, and its buckets in seconds: a tiny model's phase takes less than the second, SmolVLA's
# training on a CPU hours.
TIMED: Final = ("select", "dispatch", "collect", "commit", "degrade", "evaluate")
BUCKETS: Final = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0)

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
    "vlafleet_round_sites",
    "gauge",
    "Sites asked to train in the last round that is over, by how they ended.",
    ["state"],
)
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
    "vlafleet_held_out_loss",
    "gauge",
    "The mean held-out loss of the sites that the last evaluation measured, by frames.",
)
BASE_LOSS = Metric(
    "vlafleet_base_held_out_loss",
    "gauge",
    "The same sites' mean held-out loss in round 0, of the base model.",
)
BEST_LOSS = Metric(
    "vlafleet_best_held_out_loss", "gauge", "The same sites' mean held-out loss in the best round."
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


def families(view: View) -> Iterator[Family]:
    """Every family of ``METRICS``, with its samples at the moment of the view."""
    yield from _run(view)
    yield from _round(view)
    yield from _losses(view)
    yield from _sites(view)
    yield from _counters(view.totals)
    yield _gauge(UNREADABLE, view.unreadable)


def _run(view: View) -> Iterator[Family]:
    config = view.config or {}
    settings = config.get("config", {})
    info = RUN.info()
    if config:
        told = {
            key: str(settings.get(key, "")) for key in ("model", "strategy", "exchange", "codec")
        }
        info.add_metric([], {"run": str(config.get("run", "")), **told})
    yield info
    yield _gauge(RUN_START, _unix(config.get("started_at")))
    yield _gauge(RUN_ENDED, float(config.get("ended") is not None) if config else None)
    yield _gauge(RUN_ROUNDS, settings.get("rounds"))
    yield _gauge(ROUND_TIMEOUT, settings.get("round-timeout"))


def _round(view: View) -> Iterator[Family]:
    progress, last = view.progress or {}, view.rounds[-1] if view.rounds else {}
    ended = (view.config or {}).get("ended")
    yield _gauge(ROUND, progress.get("round", last.get("round")))
    phase, since = progress.get("phase"), progress.get("since")
    if ended is not None:
        # Of a run of an older release, and of one that could not say it any more.
        phase, since = "done", since if phase == "done" else _unix(ended.get("at"))
    family = PHASE.gauge()
    for each in PHASES if phase is not None else ():
        family.add_metric([each], float(each == phase))
    yield family
    yield _gauge(PHASE_START, since)
    family = ROUND_SITES.gauge()
    if last:
        trained = [entry["train"] for entry in last["sites"].values()]
        ends = Counter(str(entry["state"]) for entry in trained if entry is not None)
        for state in STATES[1:]:
            family.add_metric([state], ends[state])
    yield family
    yield _gauge(PARTICIPATION, last["aggregate"].get("participation") if last else None)
    yield _gauge(AGGREGATION, view.standing.aggregation)


def _losses(view: View) -> Iterator[Family]:
    standing, last = view.standing, view.rounds[-1]["round"] if view.rounds else None
    yield _gauge(TRAIN_LOSS, standing.train_loss)
    yield _gauge(LOSS, standing.loss)
    yield _gauge(BASE_LOSS, standing.base_loss)
    yield _gauge(BEST_LOSS, standing.best_loss)
    best = standing.best_round
    yield _gauge(BEST_ROUND, best)
    yield _gauge(SINCE_BEST, None if best is None or last is None else last - best)
    yield _gauge(CHECKPOINT, standing.checkpoint_at)


def _sites(view: View) -> Iterator[Family]:
    described: Mapping[str, Record] = (view.config or {}).get("sites") or {}
    progress: Mapping[str, Record] = (view.progress or {}).get("sites", {})
    sites = sorted(view.standing.sites.items())
    states, seconds = SITE_STATE.gauge(), SITE_SECONDS.gauge()
    episodes, frames = SITE_EPISODES.gauge(), SITE_DATASET_FRAMES.gauge()
    for name, site in sites:
        state = _state(site, progress.get(name))
        for each in STATES:
            states.add_metric([name, each], float(each == state))
        for kind, entry in (("train", site.train), ("evaluate", site.evaluate)):
            if entry is not None and entry.get("seconds") is not None:
                seconds.add_metric([name, kind], entry["seconds"])
        about = described.get(name, {})
        for part in ("train", "held_out"):
            for family, what in ((episodes, "episodes"), (frames, "frames")):
                if (number := about.get(f"{part}_{what}")) is not None:
                    family.add_metric([name, part], number)
    yield from (states, seconds, episodes, frames)
    for metric, value in _SITE_GAUGES:
        family = metric.gauge()
        for name, site in sites:
            if (measured := value(site)) is not None:
                family.add_metric([name], measured)
        yield family


def _state(site: SiteStanding, now: Record | None) -> str | None:
    """How the site's last training goes, or ended."""
    if now is not None and now.get("kind") == "train":
        return str(now.get("state"))
    return str(site.train["state"]) if site.train is not None else None


def _counters(totals: Totals) -> Iterator[Family]:
    rounds, durations = ROUNDS.counter(), PHASE_SECONDS.histogram()
    for result in RESULTS:
        rounds.add_metric([result], totals.rounds[result])
    yield rounds
    for phase in TIMED:
        taken = totals.phases[phase]
        bounds = [*map(str, BUCKETS), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(taken.counts)), strict=True))
        durations.add_metric([phase], buckets=buckets, sum_value=taken.seconds)
    yield durations
    drops, payload, frames = SITE_DROPS.counter(), PAYLOAD.counter(), SITE_FRAMES.counter()
    restarts = SITE_RESTARTS.counter()
    for name in sorted(totals.drops):
        for reason in DROPS:
            drops.add_metric([name, reason], totals.drops[name][reason])
        for (kind, way), size in sorted(totals.bytes[name].items()):
            payload.add_metric([name, kind, way], size)
        frames.add_metric([name], totals.frames[name])
        if name in totals.restarts:
            # The site's own count: a 0 before it would make old restarts look new.
            restarts.add_metric([name], totals.restarts[name][1])
    yield from (drops, payload, frames, restarts)


def _gauge(metric: Metric, value: float | None) -> Family:
    family = metric.gauge()
    if value is not None:
        family.add_metric([], value)
    return family


def _unix(moment: str | None) -> float | None:
    return None if moment is None else datetime.fromisoformat(moment).timestamp()


def _trained(key: str) -> Callable[[SiteStanding], float | None]:
    """What a site's last completed training said; records of older releases lack some."""
    return lambda site: None if site.completed is None else site.completed.get(key)


_SITE_GAUGES: Final[tuple[tuple[Metric, Callable[[SiteStanding], float | None]], ...]] = (
    (SITE_TRAIN_LOSS, _trained("loss")),
    (SITE_LOSS, lambda site: site.loss),
    (SITE_BASE_LOSS, lambda site: site.base_loss),
    (SITE_BEST_LOSS, lambda site: site.best_loss),
    (SITE_NORM, _trained("update_norm")),
    (SITE_RATE, _trained("samples_per_second")),
    (SITE_WAIT, _trained("data_wait")),
    (SITE_GPU_USED, _trained("gpu_memory_bytes")),
    (SITE_GPU_SIZE, _trained("gpu_memory_total_bytes")),
    (SITE_GPU_BUSY, _trained("gpu_utilization")),
    (SITE_DISK_FREE, _trained("disk_free_bytes")),
    (SITE_DISK_SIZE, _trained("disk_size_bytes")),
)
