"""Each anomaly is found where it is, once, and nowhere else."""

from typing import Any

import pytest

from app.anomalies import Anomaly, Kind, find
from tests.records import SITE, evaluated, record, trained

LOSSES = {"site-a": 2.0, "site-b": 1.0, "site-c": 1.5}


def found(rounds: list[dict[str, Any]], **settings: Any) -> list[Anomaly]:
    config = {"config": {"rounds": 3, **settings}, "sites": dict.fromkeys(LOSSES, SITE)}
    return find(config, rounds)


def scaled(number: int, factor: float) -> dict[str, Any]:
    return record(number, {site: factor * loss for site, loss in LOSSES.items()})


def test_a_run_as_it_should_be_has_none() -> None:
    assert found([scaled(0, 1.0), scaled(1, 0.8), scaled(2, 0.9), scaled(3, 0.7)]) == []


@pytest.mark.parametrize("state", ["late", "timeout", "offline", "error", "invalid"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_site_that_did_not_complete(state: str, kind: str) -> None:
    one = scaled(1, 0.8)
    one["sites"]["site-b"][kind] |= {"state": state, "reason": "its link was cut", "loss": None}
    assert found([scaled(0, 1.0), one]) == [
        Anomaly(1, "site-b", Kind.DROPPED, f"round 1 {kind}: site-b {state}, its link was cut")
    ]


def test_sites_asked_to_spare_may_be_late() -> None:
    one = scaled(1, 0.8)
    one["sites"]["site-b"]["train"] |= {"state": "late", "reason": "the round closed"}
    one["sites"]["site-c"]["train"] |= {"state": "late", "reason": "the round closed"}
    rounds = [scaled(0, 1.0), one]
    assert found(rounds, **{"sites-per-round": 1, "over-sampling": 3.0}) == []
    # Without over-sampling the round waited for them.
    kinds = [anomaly.kind for anomaly in found(rounds, **{"over-sampling": 1.0})]
    assert kinds == [Kind.DROPPED, Kind.DROPPED, Kind.PARTICIPATION]


def test_half_of_the_sites_is_enough_and_less_is_not() -> None:
    lost = {"state": "offline", "reason": "gone"}
    one, two = scaled(1, 0.9), scaled(2, 0.8)
    for each in (one, two):
        each["sites"]["site-d"] = {"dataset": "x", "train": trained(), "evaluate": None}
    for site in ("site-a", "site-b"):
        one["sites"][site]["train"] |= lost
    for site in ("site-a", "site-b", "site-c"):
        two["sites"][site]["train"] |= lost
    low = [a for a in found([scaled(0, 1.0), one, two]) if a.kind is Kind.PARTICIPATION]
    assert low == [
        Anomaly(2, None, Kind.PARTICIPATION, "round 2: 1 of the 4 sites it waits for trained")
    ]


def test_a_failed_round_says_why() -> None:
    first, *others = found([scaled(0, 1.0), record(1, LOSSES, committed=False)])
    assert first == Anomaly(1, None, Kind.FAILED, "round 1: no valid update: the last model stays")
    assert {anomaly.kind for anomaly in others} == {Kind.DROPPED, Kind.PARTICIPATION}


def test_a_loss_far_above_its_best_is_a_spike() -> None:
    one, two = scaled(1, 0.5), scaled(2, 0.5)
    two["sites"]["site-b"]["evaluate"]["loss"] = 0.76
    assert found([scaled(0, 1.0), one, two]) == [
        Anomaly(
            2,
            "site-b",
            Kind.SPIKE,
            "round 2 evaluate: site-b's held-out loss is 0.760, over 1.5 times its best, 0.500",
        )
    ]
    # At the bound it is none yet; and the best is the lowest so far, not the last.
    two["sites"]["site-b"]["evaluate"]["loss"] = 0.75
    assert found([scaled(0, 1.0), one, two]) == []


def test_a_spike_everywhere_is_the_means_too() -> None:
    sites = [a.site for a in found([scaled(0, 1.0), scaled(1, 0.5), scaled(2, 0.8)])]
    assert sites == [None, "site-a", "site-b", "site-c"]


def test_a_round_without_a_measurement_does_not_hide_the_best() -> None:
    gap = scaled(2, 0.5)
    gap["sites"]["site-a"]["evaluate"] = evaluated(None)
    spikes = [
        (a.round, a.site)
        for a in found([scaled(0, 1.0), scaled(1, 0.5), gap, scaled(3, 0.8)])
        if a.kind is Kind.SPIKE
    ]
    assert spikes == [(3, None), (3, "site-a"), (3, "site-b"), (3, "site-c")]


@pytest.mark.parametrize(
    ("kind", "metric"),
    [
        *(("train", name) for name in ("loss", "last_loss", "grad_norm", "update_norm", "frames")),
        *(("evaluate", name) for name in ("loss", "rmse_deg", "frames")),
    ],
)
def test_a_metric_that_is_null_where_the_site_completed(kind: str, metric: str) -> None:
    one = scaled(1, 0.8)
    one["sites"]["site-c"][kind][metric] = None
    assert found([scaled(0, 1.0), one]) == [
        Anomaly(1, "site-c", Kind.MISSING, f"round 1 {kind}: site-c completed without {metric}")
    ]


def test_a_dataset_of_the_servers_that_was_not_measured() -> None:
    result = {"loss": None, "rmse_deg": None, "frames": None, "reason": "it is not LeRobot v3.0"}
    one = record(1, LOSSES, server={"hf:acme/test": result})
    assert found([scaled(0, 1.0), one]) == [
        Anomaly(
            1, None, Kind.MISSING, "round 1: hf:acme/test was not measured, it is not LeRobot v3.0"
        )
    ]


def test_an_update_far_larger_than_the_others() -> None:
    one = scaled(1, 0.8)
    for site, norm in (("site-a", 1.0), ("site-b", 1.25), ("site-c", 3.8)):
        one["sites"][site]["train"]["update_norm"] = norm
    assert found([scaled(0, 1.0), one]) == [
        Anomaly(
            1,
            "site-c",
            Kind.NORM,
            "round 1 train: site-c sent an update of norm 3.8, over 3 times the median 1.25",
        )
    ]
    one["sites"]["site-c"]["train"]["update_norm"] = 3.75
    assert found([scaled(0, 1.0), one]) == []


def test_of_two_updates_neither_is_the_odd_one() -> None:
    one = scaled(1, 0.8)
    one["sites"]["site-a"]["train"]["update_norm"] = 100.0
    one["sites"]["site-c"]["train"] = None
    assert found([scaled(0, 1.0), one]) == []
