"""What the SuperLink and the enrolment service tell Prometheus: dense where rates and zeros are asked for, bounded."""

import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import Metric as Family

from certs import guard, renewal
from certs.guard import HANDSHAKE_REASONS, log_refused_handshake
from certs.index import Issued, read_index, write_index
from certs.lifetime import LIFETIMES
from certs.metric import Metric
from certs.roles import Role
from superlink import enrolment_api, metrics
from superlink.invitations import Invitations
from superlink.metrics import RUN_STATUSES, EnrolmentCollector, FleetCollector

FINISHED = {"completed", "failed", "stopped"}
NOW = datetime.now(UTC)


def values(families: Iterable[Family]) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def assert_declared(families: Iterable[Family], declared: Iterable[Metric]) -> None:
    """Raise ``AssertionError`` unless the families are some of those declared, and say what these do."""
    known = {metric.name: metric for metric in declared}
    for family in families:
        metric = known[family.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert {frozenset(sample.labels) for sample in family.samples} == {frozenset(metric.labels)}


def node(name: str, status: str, online_until: float | None) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, status=status, online_until=online_until, heartbeat_interval=30.0
    )


def factory(nodes: list[Any], statuses: Iterable[str]) -> Any:
    """A stand-in for Flower's LinkStateFactory."""
    runs = [
        SimpleNamespace(
            status=SimpleNamespace(
                status="finished" if status in FINISHED else status,
                sub_status=status if status in FINISHED else "",
            )
        )
        for status in statuses
    ]
    state = SimpleNamespace(get_node_info=lambda: nodes, get_run_info=lambda: runs)
    return SimpleNamespace(state=lambda: state)


def test_the_sites_and_the_runs() -> None:
    until = time.time() + 60
    nodes = [
        node("site-a", "online", until),
        node("site-b", "offline", until),
        node("site-c", "registered", None),
        node("site-d", "unregistered", until),
    ]
    families = list(
        FleetCollector(factory(nodes, ["failed", "running", "completed", "failed"])).collect()
    )
    assert_declared(families, metrics.METRICS)
    told = values(families)
    assert {key[1]: value for key, value in told.items() if key[0] == "vlafleet_site_online"} == {
        "site-a": 1,
        "site-b": 0,
        "site-c": 0,
    }
    heartbeats = {key[1] for key in told if key[0].startswith("vlafleet_site_last_heartbeat")}
    assert heartbeats == {"site-a", "site-b"}
    # An alert that asks for no running run must find a 0.
    assert {key[1]: value for key, value in told.items() if key[0] == "vlafleet_runs"} == {
        "pending": 0,
        "starting": 0,
        "running": 1,
        "completed": 1,
        "failed": 2,
        "stopped": 0,
    }


def test_flower_has_these_statuses() -> None:
    from flwr.common.constant import Status, SubStatus

    words = {
        value
        for kind in (Status, SubStatus)
        for name, value in vars(kind).items()
        if name.isupper()
    }
    assert words - {Status.FINISHED} == set(RUN_STATUSES)


def issued(
    role: Role, name: str, ends: timedelta, *, life: timedelta | None = None, serial: int = 1
) -> Issued:
    end = NOW + ends
    return Issued(serial, role, name, end, (1,), issued_at=end - life if life else None)


def test_the_newest_certificate_of_each_holder(tmp_path: Path) -> None:
    hour, day = timedelta(hours=1), timedelta(days=1)
    out = [
        issued(Role.SITE, "site-a", hour, life=4 * hour),
        issued(Role.SITE, "site-a", 3 * hour, life=5 * hour),
        issued(Role.SUPEREXEC, "site-a", 2 * hour, life=5 * hour),
        replace(issued(Role.SITE, "site-b", hour), revoked_at=NOW),
        issued(Role.MONITOR, "prometheus", -day + hour, life=day),
        issued(Role.OPERATOR, "left", -day - hour, life=day),
        # From before the index said when.
        issued(Role.OPERATOR, "admin", day),
    ]
    invitations = Invitations(tmp_path / "invitations.json")
    invitations.create("site-c", 3600)
    families = list(EnrolmentCollector(invitations, lambda: out).collect())
    assert_declared(families, metrics.METRICS)
    told = values(families)
    expiry = "vlafleet_issued_certificate_expiry_timestamp_seconds"
    assert {key[1:]: value for key, value in told.items() if key[0] == expiry} == {
        ("site", "site-a"): out[1].not_after.timestamp(),
        ("superexec", "site-a"): out[2].not_after.timestamp(),
        ("monitor", "prometheus"): out[4].not_after.timestamp(),
        ("operator", "admin"): out[6].not_after.timestamp(),
    }
    lifetime = "vlafleet_issued_certificate_lifetime_seconds"
    assert {key[1:]: value for key, value in told.items() if key[0] == lifetime} == {
        ("site", "site-a"): 5 * 3600,
        ("superexec", "site-a"): 5 * 3600,
        ("monitor", "prometheus"): 24 * 3600,
        ("operator", "admin"): LIFETIMES[Role.OPERATOR].total_seconds(),
    }
    assert {key[1]: value for key, value in told.items() if key[0] == "vlafleet_invitations"} == {
        "open": 1,
        "used": 0,
        "expired": 0,
        "cancelled": 0,
    }


def test_the_index_keeps_when_it_was_issued(tmp_path: Path) -> None:
    path = tmp_path / "issued.jsonl"
    lines = [
        issued(Role.SITE, "site-a", timedelta(hours=1), life=timedelta(hours=2)),
        issued(Role.OPERATOR, "admin", timedelta(hours=1)),
    ]
    write_index(path, lines)
    assert read_index(path) == lines
    # What an earlier version wrote.
    path.write_text(path.read_text().replace(', "issued_at": null', ""))
    assert read_index(path) == lines


def test_counters_begin_at_zero() -> None:
    told = values(REGISTRY.collect())
    results = {key[1] for key in told if key[0] == "vlafleet_enrolments_total"}
    assert {"enrolled", "approved", "used", "busy", "unavailable"} <= results
    assert "renewed" in {key[1] for key in told if key[0] == "vlafleet_renewals_total"}
    reasons = {key[1] for key in told if key[0] == "vlafleet_failed_handshakes_total"}
    assert reasons == set(HANDSHAKE_REASONS)
    for module in (guard, renewal, enrolment_api):
        families = {family.name: family for family in REGISTRY.collect()}
        for metric in module.METRICS:
            assert families[metric.name].documentation == metric.help


@pytest.mark.parametrize("reason", HANDSHAKE_REASONS)
def test_a_failed_handshake_is_a_refusal(reason: str) -> None:
    def count() -> list[float | None]:
        return [
            REGISTRY.get_sample_value("vlafleet_refusals_total", {"kind": "handshake"}),
            REGISTRY.get_sample_value("vlafleet_failed_handshakes_total", {"reason": reason}),
        ]

    before = count()
    log_refused_handshake(reason, "says why", "192.0.2.7")
    assert count() == [value + 1 for value in before if value is not None]


def test_registering_reads_nothing() -> None:
    registry = CollectorRegistry()
    registry.register(FleetCollector(None))  # type: ignore[arg-type]
    registry.register(EnrolmentCollector(None, list))  # type: ignore[arg-type]
