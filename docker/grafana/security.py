"""Who was refused and why, who came in, and how long every certificate still lives."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders import dashboard

from docker.grafana.panels import Panel, board, graph, line, number, rows
from docker.grafana.runbook import runbook
from docker.grafana.values import GREEN, LIFE_LEFT, RED, Ask, Column, high_is_bad, none

_LEFT = "{0}_expiry_timestamp_seconds - time()"
_LIFE = "({0}_expiry_timestamp_seconds - time()) / {0}_lifetime_seconds"
_OWN = "vlafleet_certificate"
_ISSUED = "vlafleet_issued_certificate"
# As many refusals in 5 minutes as RefusalsSurging waits for.
_SURGE = [(None, GREEN), (20, RED)]


def build() -> dashboard.Dashboard:
    """Return the dashboard."""
    made = board("security", "Security", "Refusals, members, and certificates.")
    for panel in (*_now(), *_refusals(), *_members(), *_certificates()):
        made.with_panel(panel)
    return made


def _now() -> Iterator[Panel]:
    for panel_id, kind, title, says in [
        (1, "request", "Refused requests", "Requests of the time shown that a role guard refused."),
        (2, "handshake", "Failed handshakes", "Connections of the time shown that TLS refused."),
    ]:
        yield number(
            panel_id,
            title,
            says,
            Ask(f'round(sum(increase(vlafleet_refusals_total{{kind="{kind}"}}[$__range])))'),
            steps=high_is_bad(1, 20),
            links=runbook("RefusalsSurging"),
        )
    yield number(
        3,
        "Open invitations",
        "Invitations that somebody may still use.",
        Ask('vlafleet_invitations{state="open"}'),
    )
    yield number(
        4,
        "Enrolled",
        "Members that came in, in the time shown.",
        Ask('round(sum(increase(vlafleet_enrolments_total{result="enrolled"}[$__range])))'),
    )
    yield number(
        5,
        "Renewals that failed",
        "Tries of a process to renew its certificate that failed, in the time shown.",
        Ask(
            "round(sum(increase(vlafleet_certificate_renewal_failures_total[$__range])))"
            " or vector(0)"
        ),
        steps=high_is_bad(1, 3),
        links=runbook("RenewalFailing"),
    )
    yield number(
        6,
        "Least certificate life",
        "What is left of the life of the certificate that is nearest its end; holders renew at a third.",
        Ask(f"min({_LIFE.format(_OWN)})", "in use"),
        Ask(f"min({_LIFE.format(_ISSUED)})", "issued"),
        unit="percentunit",
        decimals=0,
        steps=LIFE_LEFT,
        links=runbook("CertificateExpiring"),
    )


def _refusals() -> Iterator[Panel]:
    requests = graph(
        7,
        "Refused requests in 5 minutes",
        "By the certificate's role, the API asked for and the reason, and all together.",
        Ask('sum(increase(vlafleet_refusals_total{kind="request"}[5m]))', "all"),
        Ask(
            "sum by (role, api, reason) (increase(vlafleet_refused_requests_total[5m])) > 0"
            + none("reason"),
            "{{role}} {{api}} {{reason}}",
        ),
        steps=_SURGE,
        links=runbook("RefusalsSurging"),
    )
    yield requests.override_by_name(*line("all", wide=True))
    yield graph(
        8,
        "Failed handshakes in 5 minutes",
        "TLS connections that were refused before any request, by reason.",
        Ask("sum by (reason) (increase(vlafleet_failed_handshakes_total[5m]))", "{{reason}}"),
        steps=_SURGE,
        links=runbook("RefusalsSurging"),
    )
    yield rows(
        9,
        "Refused requests",
        "Since each service started: by which service, what role asked, for which API, and why it was refused. Names"
        " and addresses are in the service's log and its audit.jsonl.",
        {"job": "Service", "role": "Role", "api": "API", "reason": "Reason"},
        Column(
            "sum by (job, role, api, reason) (vlafleet_refused_requests_total)" + none("reason"),
            "Requests",
            steps=high_is_bad(1, 20),
        ),
        width=12,
        links=runbook("RefusalsSurging"),
    )
    yield rows(
        10,
        "Failed handshakes",
        "Since each service started, by reason.",
        {"job": "Service", "reason": "Reason"},
        Column(
            "sum by (job, reason) (vlafleet_failed_handshakes_total) > 0" + none("reason"),
            "Handshakes",
            steps=high_is_bad(1, 20),
        ),
        width=12,
        links=runbook("RefusalsSurging"),
    )


def _members() -> Iterator[Panel]:
    yield graph(
        11,
        "Invitations",
        "Of the last 30 days, by state.",
        Ask("vlafleet_invitations", "{{state}}"),
        width=8,
    )
    yield graph(
        12,
        "Enrolments",
        "Requests to be a member since the service started, by outcome.",
        Ask("sum by (result) (vlafleet_enrolments_total) > 0" + none("result"), "{{result}}"),
        width=8,
        links=runbook("RefusalsSurging"),
    )
    yield graph(
        13,
        "Renewals",
        "Requests for the next certificate since the service started, by outcome.",
        Ask("sum by (result) (vlafleet_renewals_total) > 0" + none("result"), "{{result}}"),
        width=8,
        links=runbook("RenewalFailing"),
    )


def _certificates() -> Iterator[Panel]:
    for panel_id, title, says, metric, keys in [
        (
            14,
            "Certificates in use",
            "What each process presents: time left, and that as a share of the certificate's life.",
            _OWN,
            {"job": "Process", "site": "Site", "role": "Role"},
        ),
        (
            15,
            "Certificates issued",
            "The newest certificate of every holder that is not revoked: time left, and that as a share of its life.",
            _ISSUED,
            {"role": "Role", "name": "Name"},
        ),
    ]:
        yield rows(
            panel_id,
            title,
            says,
            keys,
            Column(_LEFT.format(metric), "Left", unit="s", decimals=1),
            Column(
                _LIFE.format(metric),
                "Of its life",
                unit="percentunit",
                decimals=0,
                steps=LIFE_LEFT,
            ),
            width=12,
            height=10,
            sort_by="Of its life",
            links=runbook("CertificateExpiring"),
        )
