"""Make ``docs/metrics.md`` from the declared metrics: ``python -m docs.metrics_table``, part of ``make docs``.

A label's values are counted where they are declared, so that the table can say how many series there are at most.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from app import run_metrics
from certs import guard, process_metrics, renewal, site_metrics
from certs.metric import Metric
from certs.roles import Role
from superlink import enrolment_api
from superlink import metrics as superlink_metrics
from supernode import metrics as supernode_metrics

PATH: Final = Path(__file__).with_name("metrics.md")

# What a label has as many values of as there are, and no declaration knows.
SITE, HOLDER, ROLE = "site", "holder", "role"
# Paths of the process that has most, the SuperLink; "other" among them. At one, a role can be refused for four reasons:
# the role, an expired or revoked certificate, no certificate, a path that is none, a protocol that is not HTTP.
PATHS: Final = 18
_REASONS_AT_A_PATH = 4
# Roles of a refused request: those of certificates, and none.
ROLES: Final = len(Role) + 1
# What prometheus_client tells of every process: process_* and python_*.
OWN_SERIES: Final = 16

# How many values a label has (or of what), unless a metric says otherwise below.
_VALUES: Final[Mapping[str, int | str]] = {
    "site": SITE,
    "direction": 2,
    "phase": len(run_metrics.PHASES),
    "part": len(site_metrics.VALUES["part"]),
    "gpu": len(site_metrics.VALUES["gpu"]),
    "volume": 1,
    "role": 1,
}
_VALUES_OF: Final[Mapping[str, Mapping[str, int | str]]] = {
    "vlafleet_rounds": {"result": len(run_metrics.RESULTS)},
    "vlafleet_round_sites": {"state": len(run_metrics.STATES)},
    "vlafleet_phase_duration_seconds": {
        # With +Inf, the sum and the count.
        "phase": len(run_metrics.TIMED) * (len(run_metrics.BUCKETS) + 3)
    },
    "vlafleet_payload_bytes": {"kind": 2},
    "vlafleet_site_round_duration_seconds": {"kind": 2},
    "vlafleet_site_state": {"state": len(run_metrics.STATES)},
    "vlafleet_site_drops": {"reason": len(run_metrics.DROPS)},
    "vlafleet_runs": {"status": len(superlink_metrics.RUN_STATUSES)},
    "vlafleet_invitations": {"state": len(superlink_metrics.INVITATION_STATES)},
    "vlafleet_issued_certificate_expiry_timestamp_seconds": {"name": HOLDER},
    "vlafleet_issued_certificate_lifetime_seconds": {"name": HOLDER},
    "vlafleet_enrolments": {"result": len(enrolment_api.ENROLMENT_RESULTS)},
    "vlafleet_renewals": {"result": len(enrolment_api.RENEWAL_RESULTS)},
    "vlafleet_refusals": {"kind": 2},
    "vlafleet_refused_requests": {"role": ROLE, "api": PATHS, "reason": _REASONS_AT_A_PATH},
    "vlafleet_failed_handshakes": {"reason": len(guard.HANDSHAKE_REASONS)},
    "vlafleet_trainer_cache": {"tier": 1},
    "vlafleet_trainer_jobs": {
        "kind": len(site_metrics.VALUES["kind"]),
        "result": len(site_metrics.VALUES["result"]),
    },
    # The sum and the count.
    "vlafleet_trainer_job_seconds": {"kind": 2 * len(site_metrics.VALUES["kind"])},
}

_EVERYWHERE = (*process_metrics.METRICS, *renewal.METRICS, *guard.METRICS)


@dataclass(frozen=True)
class Section:
    """A process and what it tells beside what every process does; ``reported`` is there once more, of another one."""

    title: str
    text: str
    metrics: Sequence[Metric]
    reported: Sequence[Metric] = ()

    def series(self) -> Counter[str]:
        """How many series it has at most: fixed (the empty name), and for each of what a label names."""
        total = Counter({"": OWN_SERIES})
        for metric in (*self.metrics, *_EVERYWHERE, *self.reported):
            total.update(series(metric))
        return total


SECTIONS: Final = (
    Section(
        "Exporter",
        "`vlafleet exporter`, port 9095: what the runs' records say. Gauges are of the newest run; counters and "
        "histograms add up all runs. `site` has one value for each site that took part in a run that is still there.",
        run_metrics.METRICS,
    ),
    Section(
        "SuperLink",
        "`vlafleet superlink`, port 9092: what Flower knows of SuperNodes and runs. `site` has one value for each "
        "registered site.",
        superlink_metrics.SUPERLINK,
    ),
    Section(
        "Enrolment service",
        "`vlafleet enrolment`, port 9093. `role` and `name` are the holder of a certificate: two for each site, "
        "its SuperNode and its SuperExec, and one for each process and person of the operator's.",
        (*superlink_metrics.ENROLMENT, *enrolment_api.METRICS),
    ),
    Section(
        "Site exporter",
        "A site's SuperNode, at its Runtime API's port, and in plain HTTP where `--metrics` says. All but the first "
        "rows is what its SuperExec reports of the trainer, the GPU and the disk; a report is shown until it is 30 s "
        "old, and what it may hold is bounded whatever the trainer says.",
        (*supernode_metrics.METRICS, *site_metrics.METRICS),
        # The SuperExec's certificate, disk and last contact, beside the SuperNode's.
        reported=(*process_metrics.METRICS, *renewal.METRICS, site_metrics.CONTACT),
    ),
)


def series(metric: Metric) -> Counter[str]:
    """How many series a metric has at most, by what they are multiplied with (the empty name: nothing)."""
    # All of an info's labels belong to its one series.
    labels = () if metric.kind == "info" else metric.labels
    values = [{**_VALUES, **_VALUES_OF.get(metric.name, {})}[label] for label in labels]
    (unit,) = [value for value in values if isinstance(value, str)] or [""]
    return Counter({unit: prod(value for value in values if isinstance(value, int))})


def text() -> str:
    """Return the page."""
    parts = [_HEAD]
    for section in SECTIONS:
        parts += [f"## {section.title}\n", _wrapped(section.text), _table(section.metrics)]
    parts += ["## Every process\n", _wrapped(_EVERY_TEXT), _table(_EVERYWHERE)]
    return "\n".join([*parts, "## Series\n", _wrapped(_SERIES_TEXT), _bounds()])


_HEAD = """# Metrics

<!-- Made by docs/metrics_table.py from the declarations: change these, and run `make docs`. -->

Every metric that a process of this project tells Prometheus, over mutual TLS to a certificate of role `monitor`. Names
follow [Prometheus' naming page](https://prometheus.io/docs/practices/naming): base units, ratios from 0 to 1, times as
Unix seconds. A counter's series are there with 0 before the first event wherever an alert asks for an increase. A gauge
of what was not measured has no sample. A histogram has `_bucket`, `_sum` and `_count`, a summary the last two. What the
processes log is in [logs.md](logs.md).
"""

_EVERY_TEXT = (
    "Exporter, SuperLink, enrolment service and site exporter; `role` is the process's own. `volume` is `runs`, "
    "`state`, `enrolment` and `site` in this order. The site exporter shows its SuperExec's certificate beside its "
    "own. `prometheus_client` adds `process_*` and `python_*`."
)
_SERIES_TEXT = (
    "At most so many, whatever peers send. Only `vlafleet_refused_requests_total` grows by what strangers do: at most "
    f"{PATHS * _REASONS_AT_A_PATH} for each role ({len(Role)}, and `none`), usually a handful."
)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _table(metrics: Iterable[Metric]) -> str:
    rows = ["| metric | kind | labels | what it says |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append(f"| `{metric.shown}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join([*rows, ""])


def _bounds() -> str:
    rows = [
        "| process | fixed | per site | per holder of a certificate | per role refused "
        "| with 100 sites, none refused |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for section in SECTIONS:
        found = section.series()
        # 200 of sites, and the operator's.
        hundred = found[""] + 100 * found[SITE] + 210 * found[HOLDER]
        cells = [found[""], found[SITE], found[HOLDER], found[ROLE], hundred]
        rows.append(f"| {section.title} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    PATH.write_text(text())
