"""Declared metrics: names that Prometheus' naming page allows, and series that have a bound."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from certs.metric import Metric


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "site_online"}, "'site_online' is not vlafleet_ and words"),
        ({"name": "vlafleet_siteOnline"}, "'vlafleet_siteOnline' is not vlafleet_ and words"),
        ({"name": "vlafleet_site__online"}, "is not vlafleet_ and words"),
        ({"name": "vlafleet_wait_ms"}, "'vlafleet_wait_ms' is in ms: use seconds, bytes, ratio"),
        ({"name": "vlafleet_free_percent"}, "is in percent"),
        ({"name": "vlafleet_runs_total"}, "ends with a suffix that its kind adds"),
        ({"help": "Runs"}, "the help of metric 'vlafleet_runs' is not a sentence"),
        ({"labels": ["address"]}, "has the label 'address', which has no bound"),
    ],
)
def test_a_name_that_breaks_a_rule(wrong: dict[str, Any], words: str) -> None:
    right: dict[str, Any] = {
        "name": "vlafleet_runs",
        "kind": "gauge",
        "help": "Runs.",
        "labels": ["status"],
    }
    Metric(**right)
    with pytest.raises(ValueError, match=words):
        Metric(**{**right, **wrong})


def test_an_info_may_say_more() -> None:
    assert Metric("vlafleet_run", "info", "The run.", ("run", "model")).shown == "vlafleet_run_info"


def test_what_a_query_asks_for() -> None:
    assert Metric("vlafleet_runs", "gauge", "Runs.").shown == "vlafleet_runs"
    assert Metric("vlafleet_drops", "counter", "Drops.").shown == "vlafleet_drops_total"


def test_a_counter_has_no_series_for_when_it_began() -> None:
    registry = CollectorRegistry()
    Metric("vlafleet_drops", "counter", "Drops.", ["site"]).counting(registry).labels("a").inc(2)
    lines = generate_latest(registry).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'vlafleet_drops_total{site="a"} 2.0'
    ]
