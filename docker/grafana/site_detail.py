"""One site: what the operator knows from its answers, and what its own exporter says where it is scraped."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard

from docker.grafana import site_exporter
from docker.grafana.panels import (
    Panel,
    bars,
    board,
    graph,
    line,
    number,
    row,
    site_variable,
    states,
)
from docker.grafana.runbook import runbook
from docker.grafana.values import (
    DATA_WAIT,
    DISK_FREE,
    GREEN,
    LIFE_LEFT,
    ONLINE,
    RED,
    STATES,
    Ask,
    coded,
    codes,
    high_is_bad,
)

_SITE = '{site="$site"}'


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board(
        "site", "Site", "One site, from its answers to the operator and from its own exporter."
    )
    made.with_variable(site_variable())
    made.with_row(row(100, "$site, as the operator knows it"))
    for panel in (*_standing(), *_rounds(), *_machine()):
        made.with_panel(panel)
    exporter = row(200, "Site exporter: of $site itself, where Prometheus reaches it")
    for panel in site_exporter.panels():
        exporter.with_panel(panel)
    return made.with_row(exporter)


def _standing() -> Iterator[Panel]:
    yield number(
        1,
        "Now",
        "Whether the SuperLink hears from the site's SuperNode.",
        Ask(f"vlafleet_site_online{_SITE}"),
        width=3,
        texts=ONLINE,
        steps=[(None, RED), (1, GREEN)],
        links=runbook("SiteOffline"),
    )
    yield number(
        2,
        "Last heard",
        "How long ago the site's last heartbeat came; one is due every 30 s.",
        Ask(f"time() - vlafleet_site_last_heartbeat_timestamp_seconds{_SITE}"),
        unit="s",
        decimals=0,
        width=3,
        steps=high_is_bad(35, 60),
        links=runbook("SiteOffline"),
    )
    yield number(
        3,
        "Last training",
        "How the site's last training goes, or ended.",
        Ask(coded("vlafleet_site_state", "state", STATES, where='site="$site"')),
        texts=codes(STATES),
        links=runbook("SiteDropsOut"),
    )
    yield number(
        4,
        "Rounds missed",
        "Rounds of the time shown that the site was asked to train in and did not contribute to.",
        Ask(f"round(sum(increase(vlafleet_site_drops_total{_SITE}[$__range])))"),
        width=3,
        steps=high_is_bad(1, 5),
        links=runbook("SiteDropsOut"),
    )
    yield number(
        5,
        "Held-out loss",
        "On the site's held-out episodes, now and of the base model.",
        Ask(f"vlafleet_site_held_out_loss{_SITE}", "now"),
        Ask(f"vlafleet_site_base_held_out_loss{_SITE}", "base model"),
        decimals=3,
        width=5,
        links=runbook("NoImprovement"),
    )
    yield number(
        6,
        "Certificate",
        "What is left of the life of the site's newest certificate; the site renews it at a third.",
        Ask(
            '(vlafleet_issued_certificate_expiry_timestamp_seconds{role="site",name="$site"}'
            " - time())"
            ' / vlafleet_issued_certificate_lifetime_seconds{role="site",name="$site"}'
        ),
        unit="percentunit",
        decimals=0,
        width=3,
        steps=LIFE_LEFT,
        links=runbook("CertificateExpiring"),
    )
    yield number(
        7,
        "Trainer restarts",
        "How often the site's trainer ended and was started again, in the time shown.",
        Ask(f"round(increase(vlafleet_site_trainer_restarts_total{_SITE}[$__range]))"),
        width=3,
        steps=high_is_bad(1, 3),
        links=runbook("TrainerRestarting"),
    )


def _rounds() -> Iterator[Panel]:
    yield states(
        8,
        "Online",
        "Whether the SuperLink heard from the site.",
        Ask(f"vlafleet_site_online{_SITE}", "SuperNode"),
        texts=ONLINE,
        width=8,
        height=5,
        links=runbook("SiteOffline"),
    )
    yield states(
        9,
        "Training",
        "How the site's training went, or ended.",
        Ask(coded("vlafleet_site_state", "state", STATES, where='site="$site"'), "training"),
        texts=codes(STATES),
        width=8,
        height=5,
        links=runbook("SiteDropsOut"),
    )
    yield bars(
        10,
        "Rounds missed, by reason",
        "Rounds of the time shown that the site was asked to train in and did not contribute to.",
        Ask(
            f"round(sum by (reason) (increase(vlafleet_site_drops_total{_SITE}[$__range])))",
            "{{reason}}",
        ),
        height=5,
        steps=high_is_bad(1, 5),
        links=runbook("SiteDropsOut"),
    )
    losses = graph(
        11,
        "Loss",
        "In training, and on the held-out episodes beside the base model's.",
        Ask(f"vlafleet_site_train_loss{_SITE}", "training"),
        Ask(f"vlafleet_site_held_out_loss{_SITE}", "held out"),
        Ask(f"vlafleet_site_base_held_out_loss{_SITE}", "base model, held out"),
        width=8,
        minimum=None,
        links=runbook("LossSpiking"),
    )
    yield losses.override_by_name(*line("base model, held out", dashed=True))
    yield graph(
        12,
        "Update norm",
        "The L2 norm of the site's last update.",
        Ask(f"vlafleet_site_update_norm{_SITE}", "norm"),
        width=8,
        links=runbook("LossNotFinite"),
    )
    yield graph(
        13,
        "A round takes",
        "From the question to the site's last answer, or its end.",
        Ask(f"vlafleet_site_round_duration_seconds{_SITE}", "{{kind}}"),
        unit="s",
        width=8,
    )


def _machine() -> Iterator[Panel]:
    yield graph(
        14,
        "Frames trained on in a second",
        "As the last completed training said.",
        Ask(f"vlafleet_site_samples_per_second{_SITE}", "frames a second"),
        width=8,
    )
    yield graph(
        15,
        "Waiting for data",
        "The share of its training time that the site waited for data: above 30 %, the GPU starves.",
        Ask(f"vlafleet_site_data_wait_ratio{_SITE}", "waiting"),
        unit="percentunit",
        width=8,
        maximum=1,
        steps=DATA_WAIT,
        links=runbook("DataStarvesGpu"),
    )
    yield graph(
        16,
        "GPU, as the site said",
        "How busy the GPU was, and how full its memory, in the last completed training.",
        Ask(f"vlafleet_site_gpu_utilization_ratio{_SITE}", "busy"),
        Ask(
            f"vlafleet_site_gpu_memory_used_bytes{_SITE}"
            f" / vlafleet_site_gpu_memory_size_bytes{_SITE}",
            "memory",
        ),
        unit="percentunit",
        width=8,
        maximum=1,
        links=runbook("DataStarvesGpu"),
    )
    yield bars(
        17,
        "Dataset",
        "Episodes that the site trains on, and those that it holds out.",
        Ask(f"vlafleet_site_dataset_episodes{_SITE}", "episodes, {{part}}"),
        width=6,
        height=5,
    )
    yield bars(
        18,
        "Dataset's frames",
        "Frames that the site trains on, and those that it holds out.",
        Ask(f"vlafleet_site_dataset_frames{_SITE}", "frames, {{part}}"),
        unit="short",
        width=6,
        height=5,
    )
    yield bars(
        19,
        "Bytes",
        "Models and updates in the time shown, to the site (down) and from it (up).",
        Ask(
            f"sum by (kind, direction) (increase(vlafleet_payload_bytes_total{_SITE}[$__range]))",
            "{{kind}} {{direction}}",
        ),
        unit="bytes",
        width=6,
        height=5,
    )
    yield number(
        20,
        "Disk free",
        "Where the site keeps its models and moments, as its last completed training said.",
        Ask(f"vlafleet_site_disk_free_bytes{_SITE} / vlafleet_site_disk_size_bytes{_SITE}"),
        unit="percentunit",
        decimals=0,
        width=6,
        height=5,
        steps=DISK_FREE,
        links=runbook("DiskFilling"),
    )
