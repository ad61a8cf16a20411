"""What the schedule is told compares from round to round, whoever came and went."""

from typing import Any

from app.record import history
from app.schedule import Past, best


def record(**losses: float | None) -> dict[str, Any]:
    """A round in which these sites were asked; None: it gave no loss."""
    frames = {"a": 100, "b": 300, "c": 50}
    sites = {
        name: {"evaluate": {"loss": loss, "frames": frames[name] if loss is not None else None}}
        for name, loss in losses.items()
    }
    return {"sites": sites}


def test_the_same_sites_have_their_mean_by_frames() -> None:
    records = [record(a=2.0, b=1.0), record(a=1.0, b=0.6)]
    assert history(records) == [
        Past(1.25, {"a": 2.0, "b": 1.0}),
        Past(0.7, {"a": 1.0, "b": 0.6}),
    ]
    assert history([]) == []


def test_a_site_that_left_does_not_end_the_comparison() -> None:
    records = [record(a=2.0, b=1.0), record(a=1.0, b=0.6), record(a=1.5, b=None)]
    assert [past.loss for past in history(records)] == [2.0, 1.0, 1.5]
    assert best(history(records)) == 1


def test_a_site_that_joined_begins_it_anew() -> None:
    records = [record(a=0.1, b=0.1), record(a=1.0, b=1.0, c=1.0), record(a=0.5, b=0.5, c=0.5)]
    assert [past.loss for past in history(records)] == [None, 1.0, 0.5]
    assert best(history(records)) == 2


def test_a_round_that_failed_measured_nothing_and_changes_nothing() -> None:
    failed = {"sites": {"a": {"evaluate": None}, "b": {"evaluate": None}}}
    losses = [past.loss for past in history([record(a=2.0, b=1.0), failed])]
    assert losses == [1.25, None]
    assert [past.loss for past in history([failed])] == [None]
