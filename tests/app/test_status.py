"""The status document says what the newest run's record, its progress and the SuperLink say, and nothing else."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.run_progress import FILE, SCHEMA
from app.runs_view import Runs, View
from app.status import document
from tests.records import evaluated, record, run, trained

NOW = 1_800_000_000.0
STARTED = 1767225600.0  # of every record in tests/records.py: 2026-01-01 UTC
BOTH = {"site-a": 2.0, "site-b": 3.0}
ENDED = {"at": "2026-01-01T00:10:00+00:00", "reason": "completed"}


def view(root: Path) -> View:
    runs = Runs(root)
    runs.refresh()
    return runs.view


def seen(root: Path, nodes: Any = ()) -> dict[str, Any]:
    found = document("test", view(root), nodes, NOW)
    # It goes over the wire as JSON, whose numbers are finite.
    json.dumps(found, allow_nan=False)
    return found


def site(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    (one,) = [one for one in found["sites"] if one["name"] == name]
    return dict(one)


def node(name: str, status: str, heartbeat: float | None = NOW) -> dict[str, Any]:
    since = heartbeat if status == "offline" else None
    return {
        "name": name,
        "node_id": "1",
        "status": status,
        "last_heartbeat": heartbeat,
        "offline_since": since,
    }


def progress(directory: Path, number: int, phase: str, **sites: Any) -> None:
    told = {"schema": SCHEMA, "run": directory.name, "round": number, "rounds": 5, "phase": phase}
    text = json.dumps({**told, "since": NOW - 5, "sites": sites})
    (directory / FILE).write_text(text)


def asked(kind: str, state: str, reason: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "state": state, "reason": reason, "since": NOW - 5}


def test_without_a_run_the_sites_are_there(tmp_path: Path) -> None:
    found = seen(tmp_path, [node("site-b", "online"), node("site-a", "registered", None)])
    assert found["run"] is None
    assert found["rounds"] == []
    assert found["superlink"] == "online"
    assert [one["name"] for one in found["sites"]] == ["site-a", "site-b"]
    assert site(found, "site-a")["status"] == "registered"
    assert site(found, "site-a")["state"] is None
    assert (found["time"], found["federation"], found["unreadable"]) == (NOW, "test", 0)


def test_a_run_that_is_over(tmp_path: Path) -> None:
    better = {"site-a": 1.0, "site-b": 2.0}
    run(tmp_path, [record(0, BOTH), record(1, better, best=1)], ended=ENDED)
    found = seen(tmp_path, [node("site-a", "online"), node("site-b", "offline", NOW - 90)])
    told = found["run"]
    assert told == {
        "name": "17", "model": "lerobot/smolvla_base", "started_at": STARTED,
        "ended": {"at": STARTED + 600, "reason": "completed"},
        "round": 1, "rounds": 1, "round_timeout": 600.0, "phase": "done", "phase_since": STARTED + 600,
        "committed": 1, "best_round": 1, "loss": 1.5, "base_loss": 2.5, "best_loss": 1.5,
        # dispatch, collect and commit come before it
        "last_checkpoint_at": pytest.approx(STARTED + 12.7),
    }  # fmt: skip
    assert site(found, "site-b") | {"drops": {}} == {
        "name": "site-b", "status": "offline", "last_heartbeat": NOW - 90, "offline_since": NOW - 90,
        "doing": None,
        "state": "completed", "reason": None, "round": 1, "since": pytest.approx(STARTED + 16.7),
        "train_loss": 0.6, "loss": 2.0, "base_loss": 3.0, "drops": {}, "samples_per_second": None,
        "data_wait": None, "gpu_memory_bytes": None, "gpu_memory_total_bytes": None,
        "disk_free_bytes": None, "trainer_restarts": None,
    }  # fmt: skip
    assert found["rounds"] == [
        {"round": 0, "result": "committed", "reason": None, "participation": None, "loss": 2.5,
         "seconds": pytest.approx(16.7), "bytes_down": 400_000, "bytes_up": 200_000},
        {"round": 1, "result": "committed", "reason": None, "participation": 1.0, "loss": 1.5,
         "seconds": pytest.approx(16.7), "bytes_down": 400_000, "bytes_up": 200_000},
    ]  # fmt: skip


def test_losses_compare_although_a_site_is_out(tmp_path: Path) -> None:
    """Without site-b the mean is over site-a alone, in every round."""
    rounds = [record(0, BOTH), record(1, {"site-a": 1.0, "site-b": None}, best=1)]
    run(tmp_path, rounds)
    found = seen(tmp_path)
    told = found["run"]
    assert (told["loss"], told["base_loss"], told["best_loss"]) == (1.0, 2.0, 1.0)
    assert [one["loss"] for one in found["rounds"]] == [2.0, 1.0]


def test_a_site_that_failed_in_the_last_round(tmp_path: Path) -> None:
    one = record(1, BOTH, ended_at="2026-01-01T00:00:30+00:00")
    machine = {"samples_per_second": 24.0, "disk_free_bytes": 5, "trainer_restarts": 2}
    one["sites"]["site-a"]["train"] = trained(**machine)
    one["sites"]["site-b"]["train"] = trained(
        state="error", reason="DatasetError: gone", cause="dataset", loss=None, frames=None
    )
    run(tmp_path, [record(0, BOTH), one])
    found = seen(tmp_path, [node("site-b", "online")])
    failed = site(found, "site-b")
    assert (failed["state"], failed["reason"], failed["round"], failed["since"]) == (
        "error", "DatasetError: gone", 1, STARTED + 30,
    )  # fmt: skip
    assert failed["drops"] == {"error": 1}
    assert {key: site(found, "site-a")[key] for key in machine} == machine
    # The SuperLink has no SuperNode of this name.
    assert site(found, "site-a")["status"] == "unknown"


def test_an_evaluation_that_failed_counts_where_training_was_well(tmp_path: Path) -> None:
    one = record(1, {"site-a": 1.0, "site-b": None})
    one["sites"]["site-a"]["train"] = trained(state="late", reason="late", loss=None, frames=None)
    one["sites"]["site-a"]["evaluate"] = evaluated(None)
    run(tmp_path, [record(0, BOTH), one])
    found = seen(tmp_path)
    assert site(found, "site-a")["state"] == "late"
    assert (site(found, "site-b")["state"], site(found, "site-b")["round"]) == ("timeout", 1)
    # Both are of round 0, where the last round measured nothing.
    assert [site(found, name)["loss"] for name in BOTH] == [2.0, 3.0]


def test_a_round_under_way(tmp_path: Path) -> None:
    directory = run(tmp_path, [record(0, BOTH), record(1, BOTH)], rounds=5)
    progress(
        directory,
        2,
        "collect",
        **{"site-a": asked("train", "working"), "site-b": asked("train", "invalid", "a NaN")},
    )
    found = seen(tmp_path)
    told = found["run"]
    assert (told["round"], told["rounds"], told["phase"], told["phase_since"]) == (
        2, 5, "collect", NOW - 5,
    )  # fmt: skip
    assert site(found, "site-a")["doing"] == {"kind": "train", "since": NOW - 5}
    assert (site(found, "site-a")["state"], site(found, "site-a")["round"]) == ("completed", 1)
    failed = site(found, "site-b")
    assert failed["doing"] is None
    assert (failed["state"], failed["reason"], failed["round"], failed["since"]) == (
        "invalid", "a NaN", 2, NOW - 5,
    )  # fmt: skip


def test_what_is_on_record_counts_more_than_the_exchange_it_is_of(tmp_path: Path) -> None:
    """An evaluation that completed hides no failed training, and a failed round's exchange is over."""
    directory = run(tmp_path, [record(0, BOTH), record(1, BOTH, committed=False)], rounds=5)
    progress(directory, 1, "done", **{"site-a": asked("train", "completed")})
    assert site(seen(tmp_path), "site-a")["state"] == "timeout"
    progress(directory, 1, "evaluate", **{"site-a": asked("evaluate", "completed")})
    assert site(seen(tmp_path), "site-a")["state"] == "timeout"


def test_a_site_that_cannot_describe_itself_is_there(tmp_path: Path) -> None:
    directory = run(tmp_path, [], sites={}, rounds=5)
    told = asked("describe", "error", "DatasetError: no such directory")
    progress(directory, 0, "describe", **{"site-c": told, "site-d": asked("describe", "working")})
    found = seen(tmp_path)
    assert (site(found, "site-c")["state"], site(found, "site-c")["round"]) == ("error", 0)
    assert site(found, "site-d")["doing"]["kind"] == "describe"
    assert (found["run"]["round"], found["run"]["loss"]) == (0, None)


def test_a_run_that_waits_for_its_sites(tmp_path: Path) -> None:
    """Neither its model nor its sites are known yet."""
    directory = run(tmp_path, [], rounds=5, model="tiny")
    config = json.loads((directory / "config.json").read_text())
    nothing = {"model": None, "sites": None, "statistics": None}
    (directory / "config.json").write_text(json.dumps(config | nothing))
    progress(directory, 0, "wait")
    found = seen(tmp_path, [node("site-a", "registered", None)])
    told = found["run"]
    assert (told["model"], told["phase"], told["best_round"]) == ("tiny", "wait", None)
    assert (found["unreadable"], site(found, "site-a")["state"]) == (0, None)


def test_progress_of_another_run_is_nobodys(tmp_path: Path) -> None:
    directory = run(tmp_path, [record(0, BOTH)])
    progress(directory, 3, "collect")
    text = (directory / FILE).read_text().replace('"run": "17"', '"run": "16"')
    (directory / FILE).write_text(text)
    assert (seen(tmp_path)["run"]["round"], seen(tmp_path)["run"]["phase"]) == (0, None)


def test_a_site_is_its_supernode_of_today(tmp_path: Path) -> None:
    """One that was unregistered and came back is a member; one that left is there while the run knows it."""
    run(tmp_path, [record(0, {"site-a": 2.0})])
    gone = [node("site-a", "unregistered"), node("site-x", "unregistered")]
    found = seen(tmp_path, gone)
    assert [(one["name"], one["status"]) for one in found["sites"]] == [("site-a", "unregistered")]
    back = node("site-a", "online")
    for nodes in ([*gone, back], [back, *gone]):
        assert site(seen(tmp_path, nodes), "site-a")["status"] == "online"


def test_a_superlink_that_does_not_answer(tmp_path: Path) -> None:
    run(tmp_path, [record(0, BOTH)])
    found = document("test", view(tmp_path), None, NOW)
    assert found["superlink"] == "unreachable"
    assert {one["status"] for one in found["sites"]} == {"unknown"}


def test_a_damaged_run_takes_no_site_away(tmp_path: Path) -> None:
    directory = run(tmp_path, [record(0, BOTH)])
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"round-timeout"', '"other"'))
    found = seen(tmp_path, [node("site-a", "online")])
    assert (found["run"], found["unreadable"]) == (None, 1)
    assert [one["name"] for one in found["sites"]] == ["site-a"]


def test_a_document_of_a_hundred_sites_is_quick(tmp_path: Path) -> None:
    """The exporter makes one while Prometheus waits."""
    losses = {f"site-{number:03d}": 2.0 for number in range(100)}
    run(tmp_path, [record(number, losses) for number in range(25)])
    whole = view(tmp_path)
    nodes = [node(name, "online") for name in losses]
    began = time.process_time()
    found = document("test", whole, nodes, NOW)
    assert time.process_time() - began < 0.5  # 5 ms on an idle core
    assert len(found["sites"]) == 100
    assert [one["round"] for one in found["rounds"]] == [*range(15, 25)]
