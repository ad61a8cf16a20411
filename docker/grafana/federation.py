"""One screen: which site is out, why, since when, whether the model gets better, and what fires."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.common import BigValueTextMode

from docker.grafana.panels import Panel, bars, board, graph, line, number, only, rows, states
from docker.grafana.runbook import runbook
from docker.grafana.values import (
    DISK_FREE,
    GREEN,
    LIFE_LEFT,
    ONLINE,
    ORANGE,
    RED,
    STATES,
    UP,
    Ask,
    Column,
    high_is_bad,
    none,
)

_DROPS = "round(sum by (site, reason) (increase(vlafleet_site_drops_total[$__range])))"
_AGAINST_BASE = "vlafleet_site_held_out_loss / vlafleet_site_base_held_out_loss - 1"


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board(
        "federation",
        "Federation",
        "Which site is out, why and since when; whether the model gets better; what fires.",
    )
    for panel in (*_now(), *_sites(), *_over_time(), *_processes()):
        made.with_panel(panel)
    return made


def _now() -> Iterator[Panel]:
    yield number(
        1,
        "Alerts",
        "Alerts that fire: a page wants somebody now, a ticket waits for the working day.",
        Ask('count(ALERTS{alertstate="firing",severity="page"}) or vector(0)', "page"),
        Ask('count(ALERTS{alertstate="firing",severity="ticket"}) or vector(0)', "ticket"),
        steps=[(None, GREEN), (1, RED)],
    ).override_by_name("ticket", only([(None, GREEN), (1, ORANGE)]))
    yield number(
        2,
        "Sites",
        "Registered sites that the SuperLink hears from, and those that it does not.",
        Ask("sum(vlafleet_site_online) or vector(0)", "online"),
        Ask("count(vlafleet_site_online == 0) or vector(0)", "out"),
        steps=[(None, RED), (1, GREEN)],
        links=runbook("SiteOffline"),
    ).override_by_name("out", only([(None, GREEN), (1, RED)]))
    yield number(
        3,
        "Round",
        "The round that the newest run is in (0 is the base model), and how many it was asked for.",
        Ask("vlafleet_round", "round"),
        Ask("vlafleet_run_rounds", "of"),
    )
    yield number(
        4,
        "Phase, and since when",
        "What the newest run does, or done; and for how long it has been at that.",
        Ask(
            "(vlafleet_round_phase == 1) * on (instance) group_left ()"
            " (time() - vlafleet_round_phase_start_timestamp_seconds)",
            "{{phase}}",
        ),
        unit="s",
        decimals=0,
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("RoundStalled"),
    )
    yield number(
        5,
        "Held-out loss against the base model",
        "The change since round 0, now and in the best round. Below 0 the model is better than it was.",
        Ask("vlafleet_held_out_loss / vlafleet_base_held_out_loss - 1", "now"),
        Ask("vlafleet_best_held_out_loss / vlafleet_base_held_out_loss - 1", "best"),
        unit="percentunit",
        decimals=1,
        steps=[(None, GREEN), (0, RED)],
        links=runbook("NoImprovement"),
    )
    yield number(
        6,
        "Newest checkpoint",
        "How long ago a round was last committed to disk.",
        Ask("time() - vlafleet_checkpoint_timestamp_seconds", "ago"),
        unit="s",
        decimals=0,
        links=runbook("CheckpointOld"),
    )


def _sites() -> Iterator[Panel]:
    reason = (
        f"topk by (site) (1, {_DROPS}) > 0"
        ' or on (site) label_replace(vlafleet_site_online, "reason", "none", "", "")'
    )
    yield rows(
        7,
        "Sites",
        "Each registered site: whether it is heard, since when, how its last training ended and what it brings. A name"
        " leads to the site's dashboard.",
        {"site": "Site"},
        Column("vlafleet_site_online", "Now", texts=ONLINE),
        Column(
            "1000 * vlafleet_site_last_heartbeat_timestamp_seconds",
            "Last heard",
            unit="dateTimeFromNow",
        ),
        Column(
            "vlafleet_site_state == 1",
            "Last training",
            label="state",
            texts={state: (state, color) for state, color in STATES.items()},
        ),
        Column(f"sum by (site) ({_DROPS})", "Rounds missed", steps=[(None, GREEN), (1, ORANGE)]),
        Column(reason, "Mostly", label="reason", texts={"none": ("-", GREEN)}),
        Column("vlafleet_site_held_out_loss", "Held-out loss", decimals=3),
        Column(
            _AGAINST_BASE,
            "Against base",
            unit="percentunit",
            decimals=1,
            steps=[(None, GREEN), (0, RED)],
        ),
        Column("vlafleet_site_samples_per_second", "Frames/s", decimals=1),
        Column(
            "vlafleet_site_disk_free_bytes / vlafleet_site_disk_size_bytes",
            "Disk free",
            unit="percentunit",
            decimals=0,
            steps=DISK_FREE,
        ),
        width=16,
        to_site=True,
        sort_by="Site",
        links=runbook("SiteDropsOut"),
    )
    firing = (
        'label_join(ALERTS_FOR_STATE and ignoring (alertstate) ALERTS{alertstate="firing"},'
        ' "of", " ", "site", "job", "role", "name", "volume")'
    )
    yield rows(
        8,
        "Firing alerts",
        "What fires, of which site or process, and since when its condition has held.",
        {"alertname": "Alert", "severity": "Severity", "of": "Of"},
        Column(
            f"1000 * max by (alertname, severity, of) ({firing})" + none("alertname"),
            "Since",
            unit="dateTimeFromNow",
            texts={"0": ("-", GREEN)},
        ),
        width=8,
        links=runbook(),
    )


def _over_time() -> Iterator[Panel]:
    losses = graph(
        9,
        "Held-out loss",
        "On episodes that no site trains on: the mean by frames, the base model's, and the worst and the best site's.",
        Ask("vlafleet_held_out_loss", "all sites"),
        Ask("vlafleet_base_held_out_loss", "base model"),
        Ask("max(vlafleet_site_held_out_loss)", "worst site"),
        Ask("min(vlafleet_site_held_out_loss)", "best site"),
        width=9,
        minimum=None,
        links=runbook("LossNotFinite"),
    )
    losses.override_by_name(*line("all sites", wide=True))
    yield losses.override_by_name(*line("base model", dashed=True))
    yield states(
        10,
        "Sites over time",
        "Whether the SuperLink hears from the site; Flower waits 60 s for a heartbeat.",
        Ask("vlafleet_site_online", "{{site}}"),
        texts=ONLINE,
        width=8,
        links=runbook("SiteOffline"),
    )
    yield bars(
        11,
        "Rounds missed, by site and reason",
        "Rounds of the time shown that a site was asked to train in and did not contribute to.",
        Ask(f"topk(10, {_DROPS} > 0){none('site')}", "{{site}} {{reason}}"),
        width=7,
        steps=high_is_bad(1, 5),
        links=runbook("SiteDropsOut"),
    )


def _processes() -> Iterator[Panel]:
    yield number(
        12,
        "Processes",
        "Whether Prometheus reaches each of them; of the sites that it scrapes itself, whether all.",
        Ask("min by (job) (up)", "{{job}}"),
        width=12,
        texts=UP,
        steps=[(None, RED), (1, GREEN)],
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("ExporterDown"),
    )
    yield number(
        13,
        "Disk free",
        "Free space where the runs, the SuperLink and the enrolment service keep their files.",
        Ask("min by (volume) (vlafleet_disk_free_bytes / vlafleet_disk_size_bytes)", "{{volume}}"),
        unit="percentunit",
        decimals=0,
        width=7,
        steps=DISK_FREE,
        shows=BigValueTextMode.VALUE_AND_NAME,
        links=runbook("DiskFilling"),
    )
    yield number(
        14,
        "Least certificate life",
        "What is left of the life of the certificate that is nearest its end; holders renew at a third.",
        Ask(
            "min((vlafleet_certificate_expiry_timestamp_seconds - time())"
            " / vlafleet_certificate_lifetime_seconds)",
            "left",
        ),
        unit="percentunit",
        decimals=0,
        width=5,
        steps=LIFE_LEFT,
        links=runbook("CertificateExpiring"),
    )
