"""A run round by round: its phases, what they take, who took part, what each site brought."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.common import BigValueTextMode

from docker.grafana.panels import Panel, bars, board, graph, line, number, row, rows, states
from docker.grafana.runbook import runbook
from docker.grafana.values import (
    GREEN,
    ORANGE,
    PHASES,
    RED,
    STATES,
    Ask,
    Column,
    coded,
    codes,
    high_is_bad,
)

_SECONDS = "vlafleet_site_round_duration_seconds"
_AGAINST_BASE = "vlafleet_site_held_out_loss / vlafleet_site_base_held_out_loss - 1"


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board("round", "Round detail", "The newest run: its phases, its sites, its losses.")
    for panel in (*_run(), *_phases()):
        made.with_panel(panel)
    made.with_row(row(100, "Sites in the round"))
    for panel in _sites():
        made.with_panel(panel)
    made.with_row(row(200, "Losses and updates"))
    for panel in (*_losses(), *_bytes()):
        made.with_panel(panel)
    return made


def _run() -> Iterator[Panel]:
    yield number(
        1,
        "Run",
        "The newest run, and what it trains and how: model, strategy, exchange, codec.",
        Ask("vlafleet_run_info", "{{run}}: {{model}}, {{strategy}}, {{exchange}}, {{codec}}"),
        width=8,
        shows=BigValueTextMode.NAME,
        links=runbook("RunFailed"),
    )
    yield number(
        2,
        "Began",
        "When the newest run began.",
        Ask("1000 * vlafleet_run_start_timestamp_seconds"),
        unit="dateTimeFromNow",
    )
    yield number(
        3,
        "Round",
        "The round that the run is in (0 is the base model), how many it was asked for, and the best so far.",
        Ask("vlafleet_round", "round"),
        Ask("vlafleet_run_rounds", "of"),
        Ask("vlafleet_best_round", "best"),
        links=runbook("NoImprovement"),
    )
    yield number(
        4,
        "Rounds of all runs",
        "How rounds ended: committed, committed without some of the sites (degraded), or failed.",
        Ask("sum by (result) (vlafleet_rounds_total)", "{{result}}"),
        width=5,
        shows=BigValueTextMode.VALUE_AND_NAME,
    )
    yield number(
        5,
        "Unreadable runs",
        "Runs whose record is damaged or of another release; they are left out of every count.",
        Ask("vlafleet_unreadable_runs", "runs"),
        width=3,
        steps=high_is_bad(1, 2),
    )


def _phases() -> Iterator[Panel]:
    yield states(
        6,
        "Phase",
        "What the round was at: sites are asked in dispatch and answer in collect; evaluate follows the commit.",
        Ask(coded("vlafleet_round_phase", "phase", PHASES), "phase"),
        texts=codes(PHASES),
        width=16,
        height=6,
        links=runbook("RoundStalled"),
    )
    yield number(
        7,
        "In the phase, of the round's time",
        "How long the round has been in its phase, as a share of its time-out. Beyond twice it has stalled; 0 between"
        " runs.",
        Ask(
            "(time() - vlafleet_round_phase_start_timestamp_seconds)"
            " / vlafleet_run_round_timeout_seconds * (1 - vlafleet_run_ended)",
            "of the time-out",
        ),
        unit="percentunit",
        decimals=0,
        height=6,
        steps=high_is_bad(1, 2),
        links=runbook("RoundStalled"),
    )
    yield number(
        8,
        "Combining",
        "How long the last round's updates took to be folded in and combined.",
        Ask("vlafleet_round_aggregation_seconds", "last round"),
        unit="s",
        height=6,
    )
    yield bars(
        9,
        "A phase takes, mean",
        "Over the rounds of all runs.",
        Ask(
            "vlafleet_phase_duration_seconds_sum / (vlafleet_phase_duration_seconds_count > 0)",
            "{{phase}}",
        ),
        unit="s",
    )
    yield bars(
        10,
        "A phase takes, 95th percentile",
        "Over the rounds of all runs, within the histogram's buckets.",
        Ask(
            "histogram_quantile(0.95, sum by (phase, le) (vlafleet_phase_duration_seconds_bucket))"
            " and on (phase) (vlafleet_phase_duration_seconds_count > 0)",
            "{{phase}}",
        ),
        unit="s",
    )
    yield graph(
        11,
        "Participation",
        "The share of the sites asked that completed the round.",
        Ask("vlafleet_round_participation_ratio", "completed"),
        unit="percentunit",
        width=8,
        maximum=1,
        steps=[(None, RED), (0.5, ORANGE), (1, GREEN)],
        links=runbook("ParticipationLow"),
    )


def _sites() -> Iterator[Panel]:
    yield states(
        12,
        "Training",
        "How each site's last training goes, or ended.",
        Ask(coded("vlafleet_site_state", "state", STATES, by="site"), "{{site}}"),
        texts=codes(STATES),
        links=runbook("SiteDropsOut"),
    )
    ends = graph(
        13,
        "Sites of the last round",
        "The sites that were asked to train, by how they ended.",
        Ask("sum by (state) (vlafleet_round_sites)", "{{state}}"),
        stacked=True,
        links=runbook("ParticipationLow"),
    )
    for state, color in STATES.items():
        ends.override_by_name(*line(state, color=color))
    yield ends
    yield rows(
        14,
        "Sites",
        "What each site's last answers said. A name leads to the site's dashboard.",
        {"site": "Site"},
        Column(
            "vlafleet_site_state == 1",
            "Training",
            label="state",
            texts={state: (state, color) for state, color in STATES.items()},
        ),
        Column(f'{_SECONDS}{{kind="train"}}', "Training took", unit="s", decimals=1),
        Column(f'{_SECONDS}{{kind="evaluate"}}', "Evaluation took", unit="s", decimals=1),
        Column("vlafleet_site_train_loss", "Training loss", decimals=3),
        Column("vlafleet_site_held_out_loss", "Held-out loss", decimals=3),
        Column("vlafleet_site_base_held_out_loss", "Base model's", decimals=3),
        Column("vlafleet_site_best_held_out_loss", "Best", decimals=3),
        Column("vlafleet_site_update_norm", "Update norm", decimals=3),
        Column("vlafleet_site_trained_frames_total", "Frames, all runs", unit="short"),
        to_site=True,
        sort_by="Site",
    )
    time_out = graph(
        15,
        "A site's training takes",
        "From the question to the site's last answer, or its end; and the round's time-out.",
        Ask(f'{_SECONDS}{{kind="train"}}', "{{site}}"),
        Ask("vlafleet_run_round_timeout_seconds", "time-out"),
        unit="s",
    )
    yield time_out.override_by_name(*line("time-out", dashed=True))
    yield graph(
        16,
        "A site's evaluation takes",
        "From the question to the site's last answer, or its end.",
        Ask(f'{_SECONDS}{{kind="evaluate"}}', "{{site}}"),
        unit="s",
    )


def _losses() -> Iterator[Panel]:
    losses = graph(
        17,
        "Training loss",
        "The mean of the last round, of all sites by frames and of each.",
        Ask("vlafleet_train_loss", "all sites"),
        Ask("vlafleet_site_train_loss", "{{site}}"),
        width=8,
        minimum=None,
        links=runbook("LossSpiking"),
    )
    yield losses.override_by_name(*line("all sites", wide=True))
    yield graph(
        18,
        "Held-out loss against the base model",
        "The change since round 0 on each site's held-out episodes. Below 0 the model is better than it was.",
        Ask(_AGAINST_BASE, "{{site}}"),
        unit="percentunit",
        width=8,
        minimum=None,
        steps=[(None, GREEN), (0, RED)],
        links=runbook("NoImprovement"),
    )
    yield graph(
        19,
        "Update norm",
        "The L2 norm of each site's last update: one far above the others pulls the mean.",
        Ask("vlafleet_site_update_norm", "{{site}}"),
        width=8,
        links=runbook("LossNotFinite"),
    )


def _bytes() -> Iterator[Panel]:
    moved = "sum by ({by}) (increase(vlafleet_payload_bytes_total[$__range]))"
    yield bars(
        20,
        "Bytes, by leg",
        "Models and updates that crossed the wire in the time shown, to the sites (down) and from them (up).",
        Ask(moved.format(by="kind, direction"), "{{kind}} {{direction}}"),
        unit="bytes",
    )
    yield bars(
        21,
        "Bytes, by site",
        "Models and updates that crossed the wire in the time shown, to the site (down) and from it (up).",
        Ask(moved.format(by="site, direction"), "{{site}} {{direction}}"),
        unit="bytes",
    )
    yield graph(
        22,
        "Rounds since the best",
        "How many rounds are over since the one with the lowest held-out loss.",
        Ask("vlafleet_rounds_since_best", "rounds"),
        width=8,
        links=runbook("NoImprovement"),
    )
