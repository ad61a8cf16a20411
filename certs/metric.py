"""What is told Prometheus: every metric is declared once, with a name that its naming page allows.

https://prometheus.io/docs/practices/naming. ``docs/metrics_table.py`` makes ``docs/metrics.md`` from the declarations.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter, disable_created_metrics, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

# Of every counter and histogram a series more, for when it began to count: nobody asks for it.
disable_created_metrics()  # type: ignore[no-untyped-call]

type Kind = Literal["gauge", "counter", "histogram", "summary", "info"]

# Where a site's SuperExec reports its metrics to its SuperNode, whose port is the only one it reaches.
REPORT_PATH = "/v1/metrics"
# Values of a label are few and known, or the federation's own sites, roles and GPUs. Only an info may say more.
LABELS = frozenset(
    ["api", "direction", "gpu", "kind", "name", "part", "phase", "reason", "result", "role", "site", "state", "status",
     "volume"]
)  # fmt: skip

_NAME = re.compile(r"vlafleet(_[a-z][a-z0-9]*)+")
# What base units rule out: other units of time and size, and percentages (a ratio goes from 0 to 1).
_UNITS = {
    "ms",
    "milliseconds",
    "minutes",
    "hours",
    "days",
    "kb",
    "mb",
    "gb",
    "mib",
    "gib",
    "percent",
    "percentage",
}


@dataclass(frozen=True)
class Metric:
    """A metric's name, kind, help and labels; ``ValueError`` names the metric that breaks a rule.

    The name is without the suffixes that the text format adds: ``_total`` of a counter, ``_info`` of an info.
    """

    name: str
    kind: Kind
    help: str
    labels: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"metric {self.name!r} is not vlafleet_ and words in lower case")
        if wrong := _UNITS & set(self.name.split("_")):
            raise ValueError(f"metric {self.name!r} is in {min(wrong)}: use seconds, bytes, ratio")
        if self.name.endswith(("_total", "_info", "_count", "_sum", "_bucket")):
            raise ValueError(f"metric {self.name!r} ends with a suffix that its kind adds")
        if not self.help.endswith("."):
            raise ValueError(f"the help of metric {self.name!r} is not a sentence")
        if self.kind != "info" and (wrong := set(self.labels) - LABELS):
            raise ValueError(
                f"metric {self.name!r} has the label {min(wrong)!r}, which has no bound"
            )

    @property
    def shown(self) -> str:
        """The name that a query asks for."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")

    def gauge(self) -> GaugeMetricFamily:
        """Return a family of samples that a collector fills."""
        return GaugeMetricFamily(self.name, self.help, labels=self.labels)

    def counter(self) -> CounterMetricFamily:
        """Return a family of samples that a collector fills."""
        return CounterMetricFamily(self.name, self.help, labels=self.labels)

    def histogram(self) -> HistogramMetricFamily:
        """Return a family of samples that a collector fills."""
        return HistogramMetricFamily(self.name, self.help, labels=self.labels)

    def info(self) -> InfoMetricFamily:
        """Return a family with one sample, whose labels a collector fills."""
        return InfoMetricFamily(self.name, self.help)

    def counting(self, registry: CollectorRegistry) -> Counter:
        """Return a counter that this process counts with."""
        return Counter(self.name, self.help, self.labels, registry=registry)


def exposition(families: Iterable[Family]) -> bytes:
    """Return families in Prometheus' text format."""
    return generate_latest(_Collected(families))


class _Collected(Collector):
    """What ``generate_latest`` takes, of families that are there."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        """Return them."""
        return self._families
