"""What Prometheus is told of the runs: every declared metric, with the values that the records hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from app import run_metrics, totals
from app.run_metrics import BUCKETS, DROPS, METRICS, PHASES, STATES, families
from app.runs_view import Runs, View
from tests.records import SITE, evaluated, record, run, trained

LOSSES = {"site-a": 3.0, "site-b": 2.0}
MACHINE = {
    "samples_per_second": 31.5,
    "data_wait": 0.25,
    "gpu_memory_bytes": 9e9,
    "gpu_memory_total_bytes": 24e9,
    "gpu_utilization": 0.5,
    "disk_free_bytes": 1e9,
    "disk_size_bytes": 4e9,
    "trainer_restarts": 3,
}

type Samples = dict[tuple[str, ...], float]


def viewed(root: Path) -> View:
    runs = Runs(root)
    runs.refresh()
    return runs.view


def samples(view: View) -> dict[str, Samples]:
    """Every sample by its name, then by its labels' values in the order of their names."""
    found: dict[str, Samples] = {}
    for family in families(view):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            of_name = found.setdefault(sample.name.removeprefix("vlafleet_"), {})
            assert labels not in of_name, f"{sample.name} has {labels} twice"
            of_name[labels] = sample.value
    return found


def full(root: Path) -> Path:
    """A run in its second round, of which everything is known."""
    one = record(1, LOSSES, best=1, degraded=True)
    one["aggregate"]["seconds"] = 2.5
    one["aggregate"]["participation"] = 0.5
    one["sites"]["site-a"]["train"] = trained(**MACHINE)
    one["sites"]["site-b"]["train"] = trained(state="error", cause="finite", frames=None, loss=None)
    directory = run(root, [record(0, LOSSES), one], rounds=5)
    told = {"reason": None, "since": 7.0, "kind": "train"}
    sites = {"site-a": {**told, "state": "working"}, "site-b": {**told, "state": "offline"}}
    progress(directory, phase="collect", round=2, sites=sites)
    return directory


def progress(directory: Path, **other: Any) -> None:
    said = {
        "schema": 1,
        "run": "17",
        "round": 0,
        "rounds": 5,
        "phase": "wait",
        "since": 5.0,
        "sites": {},
    }
    (directory / "progress.json").write_text(json.dumps({**said, **other}))


def test_every_declared_metric_is_told_and_no_other(tmp_path: Path) -> None:
    full(tmp_path)
    told = list(families(viewed(tmp_path)))
    assert sorted(family.name for family in told) == sorted(metric.name for metric in METRICS)
    declared = {metric.name: metric for metric in METRICS}
    for family in told:
        metric = declared[family.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, family.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample


def test_the_newest_run_s_values(tmp_path: Path) -> None:
    full(tmp_path)
    told = samples(viewed(tmp_path))
    single = {name: values[()] for name, values in told.items() if set(values) == {()}}
    assert single == {
        "run_start_timestamp_seconds": 1767225600,
        "run_ended": 0,
        "run_rounds": 5,
        "run_round_timeout_seconds": 600,
        "round": 2,
        "round_phase_start_timestamp_seconds": 5,
        "round_participation_ratio": 0.5,
        "round_aggregation_seconds": 2.5,
        "train_loss": 0.6,
        "held_out_loss": 2.5,
        "base_held_out_loss": 2.5,
        "best_held_out_loss": 2.5,
        "best_round": 1,
        "rounds_since_best": 0,
        "checkpoint_timestamp_seconds": pytest.approx(1767225612.7),
        "unreadable_runs": 0,
    }
    assert told["run_info"] == {("int8", "expert", "lerobot/smolvla_base", "17", "fedavg"): 1}
    assert told["round_phase"] == {(phase,): float(phase == "collect") for phase in PHASES}
    ended = {"completed": 1.0, "error": 1.0}
    assert told["round_sites"] == {(state,): ended.get(state, 0.0) for state in STATES[1:]}
    assert told["rounds_total"] == {("committed",): 0, ("degraded",): 1, ("failed",): 0}


def test_a_site_s_values(tmp_path: Path) -> None:
    full(tmp_path)
    told = samples(viewed(tmp_path))
    of_a = {name: values[("site-a",)] for name, values in told.items() if ("site-a",) in values}
    assert of_a == {
        "site_trained_frames_total": 240,
        "site_train_loss": 0.6,
        "site_held_out_loss": 3.0,
        "site_base_held_out_loss": 3.0,
        "site_best_held_out_loss": 3.0,
        "site_update_norm": 1.0,
        "site_samples_per_second": 31.5,
        "site_data_wait_ratio": 0.25,
        "site_gpu_memory_used_bytes": 9e9,
        "site_gpu_memory_size_bytes": 24e9,
        "site_gpu_utilization_ratio": 0.5,
        "site_disk_free_bytes": 1e9,
        "site_disk_size_bytes": 4e9,
        "site_trainer_restarts_total": 3,
    }
    assert told["site_dataset_episodes"][("train", "site-a")] == 8
    assert told["site_dataset_frames"][("held_out", "site-b")] == 97
    assert told["site_round_duration_seconds"] == {
        (kind, site): seconds
        for kind, seconds in (("train", 12.5), ("evaluate", 4.0))
        for site in ("site-a", "site-b")
    }
    assert told["payload_bytes_total"][("up", "train", "site-b")] == 100_000
    drops = told["site_drops_total"]
    assert drops == {
        (reason, site): float((reason, site) == ("diverged", "site-b"))
        for reason in DROPS
        for site in ("site-a", "site-b")
    }
    # What a site did not say is not there: 0 would be a measurement.
    assert ("site-b",) not in told["site_samples_per_second"]
    assert ("site-b",) not in told["site_trainer_restarts_total"]


def test_a_site_is_where_its_training_is(tmp_path: Path) -> None:
    directory = full(tmp_path)
    states = samples(viewed(tmp_path))["site_state"]
    assert {labels for labels, value in states.items() if value} == {
        ("site-a", "working"),
        ("site-b", "offline"),
    }
    assert len(states) == 2 * len(STATES)
    # While it evaluates, its last training is the one on record.
    told = {"kind": "evaluate", "state": "working", "reason": None, "since": 1.0}
    progress(directory, phase="evaluate", sites={"site-a": told, "site-b": told})
    states = samples(viewed(tmp_path))["site_state"]
    assert {labels for labels, value in states.items() if value} == {
        ("site-a", "completed"),
        ("site-b", "error"),
    }


def test_phases_are_counted_by_how_long_they_took(tmp_path: Path) -> None:
    long = record(1, LOSSES, seconds={"collect": 20_000.0, "commit": 0.1, "fail": 0.0})
    run(tmp_path, [record(0, LOSSES, seconds={"commit": 1.0}), long])
    told = samples(viewed(tmp_path))
    buckets = told["phase_duration_seconds_bucket"]
    assert [buckets[str(bound), "commit"] for bound in BUCKETS] == [1, *[2] * 8]
    assert [buckets[str(bound), "collect"] for bound in (*BUCKETS, "+Inf")] == [*[0] * 9, 1]
    assert told["phase_duration_seconds_sum"][("commit",)] == pytest.approx(1.1)
    assert told["phase_duration_seconds_count"][("select",)] == 0
    assert ("fail",) not in told["phase_duration_seconds_count"]


def test_before_any_run_there_are_counters_and_no_gauges(tmp_path: Path) -> None:
    told = samples(viewed(tmp_path))
    assert set(told) == {
        "rounds_total",
        "phase_duration_seconds_bucket",
        "phase_duration_seconds_count",
        "phase_duration_seconds_sum",
        "unreadable_runs",
    }


def test_a_described_site_has_its_series_before_its_first_round(tmp_path: Path) -> None:
    directory = run(tmp_path, [], sites={"site-a": SITE})
    progress(directory, phase="select", round=1)
    told = samples(viewed(tmp_path))
    assert told["site_drops_total"] == {(reason, "site-a"): 0 for reason in DROPS}
    assert set(told["payload_bytes_total"].values()) == {0}
    assert set(told["site_state"].values()) == {0}
    assert told["site_dataset_episodes"] == {("held_out", "site-a"): 2, ("train", "site-a"): 8}
    assert "site_held_out_loss" not in told
    assert "round_participation_ratio" not in told


def test_a_run_that_has_just_begun_has_described_nobody(tmp_path: Path) -> None:
    directory = run(tmp_path, [], sites=None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "sites": None, "model": None}))
    progress(directory, phase="wait")
    told = samples(viewed(tmp_path))
    assert (told["round"][()], told["round_phase"][("wait",)]) == (0, 1)
    assert "site_state" not in told


def test_a_run_that_has_ended_is_done_whatever_it_said_last(tmp_path: Path) -> None:
    """One that was killed, or written by an older release, says nothing of its end there."""
    ended = {"at": "2026-01-01T00:00:10+00:00", "reason": "completed"}
    directory = run(tmp_path, [record(0, LOSSES), record(1, LOSSES)], ended=ended)
    for said in ({}, {"phase": "collect"}, {"phase": "done", "since": 1767225610.0}):
        if said:
            progress(directory, **said)
        told = samples(viewed(tmp_path))
        assert told["round_phase"] == {(phase,): float(phase == "done") for phase in PHASES}
        assert told["round_phase_start_timestamp_seconds"] == {(): 1767225610}
        assert told["run_ended"] == {(): 1}


def test_a_failed_round_has_asked_and_lost(tmp_path: Path) -> None:
    run(tmp_path, [record(0, LOSSES), record(1, LOSSES, committed=False)])
    told = samples(viewed(tmp_path))
    assert told["rounds_total"] == {("committed",): 0, ("degraded",): 0, ("failed",): 1}
    assert told["round_participation_ratio"] == {(): 0}
    assert told["round_sites"][("timeout",)] == 2
    assert told["site_drops_total"][("timeout", "site-a")] == 1
    # The checkpoint is still round 0's.
    assert told["checkpoint_timestamp_seconds"][()] == pytest.approx(1767225600 + 12.7)


def test_the_series_of_a_site_are_bounded(tmp_path: Path) -> None:
    """The docs state the number: 37 a site that says all of itself."""
    names = [f"site-{number}" for number in range(20)]
    one = record(1, dict.fromkeys(names, 1.0))
    for name in names:
        one["sites"][name] |= {"train": trained(**MACHINE), "evaluate": evaluated(1.0)}
    run(tmp_path, [record(0, dict.fromkeys(names, 1.0)), one])
    counts = dict.fromkeys(names, 0)
    others = 0
    for family in families(viewed(tmp_path)):
        for sample in family.samples:
            if (site := sample.labels.get("site")) is not None:
                counts[site] += 1
            else:
                others += 1
    assert set(counts.values()) == {37}
    assert others < 120


def test_the_words_are_those_of_the_rounds() -> None:
    """The command line starts without Flower, so they are written down a second time."""
    from app import cause, run_progress
    from app.rounds import Phase, State

    assert {*PHASES} == {run_progress.WAIT, run_progress.DESCRIBE, *Phase}
    assert [*STATES] == [run_progress.WORKING, *State]
    assert {*DROPS} == {*State, "diverged"} - {State.COMPLETED}
    assert set(run_metrics.TIMED) < {*Phase}
    assert totals.dropped({"state": "invalid", "cause": cause.FINITE}) == "diverged"
