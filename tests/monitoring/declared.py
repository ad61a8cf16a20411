"""Every declared metric, and a history in which each of them has samples."""

import itertools
from collections.abc import Iterator, Mapping
from functools import cache

from app import run_metrics
from certs import guard, process_metrics, renewal
from certs.metric import Metric
from docs.metrics_table import SECTIONS

# What a target of each section's is called; a site's target says which site it is.
_TARGETS = {
    "Exporter": 'job="exporter",instance="exporter:9095"',
    "SuperLink": 'job="superlink",instance="superlink:9092"',
    "Enrolment service": 'job="enrolment",instance="enrolment:9093"',
    "Site exporter": 'job="site",instance="site-a:9094",site="site-a"',
}
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
# What a label is, whatever the metric.
_VALUES: Mapping[str, tuple[str, ...]] = {
    "api": ("/v1/control/",),
    "direction": ("down", "up"),
    "gpu": ("0",),
    "kind": ("train", "evaluate", "request", "handshake"),
    "le": ("1.0", "+Inf"),
    "name": ("site-a", "site-b"),
    "part": ("train", "held_out"),
    "phase": run_metrics.PHASES,
    "reason": ("error", "role"),
    "result": ("committed", "enrolled", "completed"),
    "role": ("site", "superexec"),
    "site": ("site-a", "site-b"),
    "state": (*run_metrics.STATES, "open"),
    "status": ("running",),
    "volume": ("site",),
}


@cache
def declared() -> Mapping[str, tuple[Metric, ...]]:
    """Return the metrics of each section of docs/metrics.md, those that every process has among them."""
    every = (*process_metrics.METRICS, *renewal.METRICS, *guard.METRICS)
    return {section.title: (*section.metrics, *section.reported, *every) for section in SECTIONS}


@cache
def labels() -> Mapping[str, frozenset[str]]:
    """Return the labels of every sample that a query may ask for, by the sample's name."""
    return {
        name: frozenset(metric.labels) | ({"le"} if name.endswith("_bucket") else set())
        for metric in itertools.chain(*declared().values())
        for name in _names(metric)
    }


def history(now: float, seconds: int, step: int) -> Iterator[str]:
    """Yield lines of OpenMetrics: the last ``seconds`` of a federation with two sites, whose exporters are scraped.

    Counters grow, phases and states have their first value, times are of a minute ago, and an alert fires.
    """
    series = dict(_series())
    for sample, value in series.items():
        for ago in range(seconds, -1, -step):
            moment = now - ago
            shown = {"counts": (seconds - ago) / step, "was": moment - 60, "will be": now + 3600}
            yield f"{sample} {shown[value] if isinstance(value, str) else value} {moment}\n"
    yield "# EOF\n"


def _series() -> Iterator[tuple[str, float | str]]:
    """Yield each series, and its value or what that does."""
    alert = 'alertname="SiteOffline",severity="ticket",site="site-b"'
    yield f'ALERTS{{alertstate="firing",{alert}}}', 1
    yield f"ALERTS_FOR_STATE{{{alert}}}", "was"
    for title, metrics in declared().items():
        yield f"up{{{_TARGETS[title]}}}", 1
        for metric in metrics:
            for name in _names(metric):
                yield from _samples(metric, name, _TARGETS[title])


def _samples(metric: Metric, name: str, target: str) -> Iterator[tuple[str, float | str]]:
    own = sorted(labels()[name])
    for values in itertools.product(*(_VALUES.get(label, ("x",)) for label in own)):
        said = ",".join(f'{label}="{value}"' for label, value in zip(own, values, strict=True))
        value: float | str = 1
        if "expiry" in name:
            value = "will be"
        elif name.endswith("_timestamp_seconds"):
            value = "was"
        elif metric.kind not in ("gauge", "info"):
            value = "counts"
        elif {"phase", "state"} & set(own):
            value = float(values[-1] == _VALUES[own[-1]][0])
        yield f"{name}{{{target},{said}}}" if said else f"{name}{{{target}}}", value


def _names(metric: Metric) -> list[str]:
    suffixes = _SUFFIXES.get(metric.kind)
    return [metric.name + suffix for suffix in suffixes] if suffixes else [metric.shown]
