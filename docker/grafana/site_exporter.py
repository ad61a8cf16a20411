"""What a site's own exporter says of it, where Prometheus scrapes the site: a closed row of the Site dashboard."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.models.common import BigValueTextMode

from docker.grafana.panels import (
    Panel,
    graph,
    number,
)
from docker.grafana.runbook import runbook
from docker.grafana.values import (
    DATA_WAIT,
    DISK_FREE,
    GREEN,
    LIFE_LEFT,
    RED,
    UP,
    Ask,
    high_is_bad,
)

# The labels of what is scraped there.
_OWN = 'job="site",site="$site"'


def panels() -> Iterator[Panel]:
    """Yield the row's panels."""
    yield from (*_processes(), *_trainer(), *_gpu())


def _processes() -> Iterator[Panel]:
    yield number(
        30,
        "SuperNode and trainer",
        "Whether Prometheus reaches the SuperNode, and whether the trainer answers.",
        Ask(f"up{{{_OWN}}}", "SuperNode"),
        Ask(f"vlafleet_trainer_up{{{_OWN}}}", "trainer"),
        width=6,
        texts=UP,
        steps=[(None, RED), (1, GREEN)],
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("ExporterDown"),
    )
    yield number(
        31,
        "Last contact",
        "How long ago the SuperLink answered the SuperNode (site), and the SuperNode its SuperExec.",
        Ask(f"time() - vlafleet_last_contact_timestamp_seconds{{{_OWN}}}", "{{role}}"),
        unit="s",
        decimals=0,
        width=6,
        steps=high_is_bad(35, 60),
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("SiteOffline"),
    )
    yield number(
        32,
        "Last report",
        "How long ago the SuperExec reported to the SuperNode; one is due every 5 s.",
        Ask(f"time() - vlafleet_report_timestamp_seconds{{{_OWN}}}"),
        unit="s",
        decimals=0,
        width=4,
        steps=high_is_bad(15, 30),
        links=runbook("TrainerRestarting"),
    )
    yield number(
        33,
        "Certificates",
        "What is left of their life: the SuperNode's (site) and the SuperExec's.",
        Ask(
            f"(vlafleet_certificate_expiry_timestamp_seconds{{{_OWN}}} - time())"
            f" / vlafleet_certificate_lifetime_seconds{{{_OWN}}}",
            "{{role}}",
        ),
        unit="percentunit",
        decimals=0,
        width=4,
        steps=LIFE_LEFT,
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("CertificateExpiring"),
    )
    yield number(
        34,
        "Disk free",
        "Where the site keeps its models and moments.",
        Ask(
            f"min(vlafleet_disk_free_bytes{{{_OWN}}} / vlafleet_disk_size_bytes{{{_OWN}}})",
        ),
        unit="percentunit",
        decimals=0,
        steps=DISK_FREE,
        links=runbook("DiskFilling"),
    )


def _trainer() -> Iterator[Panel]:
    yield graph(
        35,
        "Step",
        "How far the round's training is; a line that ends has no job.",
        Ask(f"vlafleet_trainer_step{{{_OWN}}}", "step"),
        Ask(f"vlafleet_trainer_steps{{{_OWN}}}", "of"),
        width=8,
    )
    yield graph(
        36,
        "Training loss",
        "Of the step that was last reported.",
        Ask(f"vlafleet_trainer_loss{{{_OWN}}}", "loss"),
        width=8,
        minimum=None,
        links=runbook("LossSpiking"),
    )
    yield graph(
        37,
        "Frames trained on in a second",
        "Of the job that runs, or ran last.",
        Ask(f"vlafleet_trainer_samples_per_second{{{_OWN}}}", "frames a second"),
        width=8,
    )
    yield graph(
        38,
        "Waiting for data",
        "The share of training time spent waiting for data: above 30 %, the GPU starves.",
        Ask(f"vlafleet_trainer_data_wait_ratio{{{_OWN}}}", "waiting"),
        unit="percentunit",
        width=8,
        maximum=1,
        steps=DATA_WAIT,
        links=runbook("DataStarvesGpu"),
    )
    yield graph(
        39,
        "Jobs",
        "Jobs since the trainer started, by kind and how they ended.",
        Ask(
            f"sum by (kind, result) (vlafleet_trainer_jobs_total{{{_OWN}}})", "{{kind}} {{result}}"
        ),
        width=8,
    )
    yield graph(
        40,
        "Trainer restarts",
        "How often the trainer ended and was started again since the SuperExec started.",
        Ask(f"vlafleet_trainer_restarts_total{{{_OWN}}}", "restarts"),
        width=8,
        links=runbook("TrainerRestarting"),
    )
    yield graph(
        41,
        "Trainer's memory",
        "Memory of the trainer that is in RAM.",
        Ask(f"vlafleet_trainer_process_resident_memory_bytes{{{_OWN}}}", "resident"),
        unit="bytes",
        width=8,
    )
    yield graph(
        42,
        "Trainer's processors",
        "Seconds of processor time in a second: 1 is one core.",
        Ask(
            f"rate(vlafleet_trainer_process_cpu_seconds_total{{{_OWN}}}[$__rate_interval])",
            "cores",
        ),
        width=8,
    )
    yield graph(
        43,
        "Link to the SuperLink",
        "How fast the link was when the SuperNode started: from the site (up) and to it (down).",
        Ask(f"vlafleet_link_bytes_per_second{{{_OWN}}}", "{{direction}}"),
        unit="Bps",
        width=8,
    )


def _gpu() -> Iterator[Panel]:
    yield graph(
        44,
        "GPU busy",
        "The share of the last moments in which each GPU computed.",
        Ask(f"vlafleet_gpu_utilization_ratio{{{_OWN}}}", "GPU {{gpu}}"),
        unit="percentunit",
        maximum=1,
        links=runbook("DataStarvesGpu"),
    )
    yield graph(
        45,
        "GPU memory",
        "In use by whatever process, what there is, and what torch holds in the trainer.",
        Ask(f"vlafleet_gpu_memory_used_bytes{{{_OWN}}}", "GPU {{gpu}}, in use"),
        Ask(f"vlafleet_gpu_memory_size_bytes{{{_OWN}}}", "GPU {{gpu}}, size"),
        Ask(f"vlafleet_trainer_gpu_memory_bytes{{{_OWN}}}", "torch"),
        unit="bytes",
    )
