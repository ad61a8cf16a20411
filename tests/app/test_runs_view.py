"""The runs directory as the exporter follows it, while others write, resume, copy and delete runs in it."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.durable import point
from app.journal import Journal, parse
from app.run_metrics import DROPS
from app.run_progress import RunProgress
from app.runs_view import Runs
from certs.errors import StorageError
from tests.records import SITE, evaluated, record, run, trained

LOSSES = {"site-a": 3.0, "site-b": 2.0}
NO_DROPS = dict.fromkeys(DROPS, 0)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def append(directory: Path, *records: dict[str, Any]) -> None:
    """Add rounds as a ServerApp that goes on with the run does."""
    journal = Journal(directory.parent, directory.name)
    for one in records:
        journal.append(one)
    journal.close()


def dropped(number: int, state: str, cause: str | None = None) -> dict[str, Any]:
    """A round in which site-b trained and did not contribute."""
    one = record(number, LOSSES)
    nothing = dict.fromkeys(("loss", "update_norm", "frames"))
    one["sites"]["site-b"]["train"] = trained(state=state, cause=cause, **nothing)
    return one


def test_a_directory_that_is_not_there_yet_holds_no_runs(root: Path, runs: Runs) -> None:
    assert not runs.refresh()
    assert (runs.view.config, runs.view.unreadable, runs.view.totals.drops) == (None, 0, {})
    run(root, [record(0, LOSSES)])
    assert runs.refresh()
    assert not runs.refresh()
    assert runs.view.config is not None
    assert runs.view.config["run"] == "17"


def test_what_is_no_directory_is_said(root: Path, runs: Runs) -> None:
    root.write_text("")
    with pytest.raises(StorageError, match="cannot be listed"):
        runs.refresh()


def test_a_site_has_every_counter_from_its_description_on(root: Path, runs: Runs) -> None:
    run(root, [], sites={"site-a": SITE})
    runs.refresh()
    assert runs.view.totals.drops == {"site-a": NO_DROPS}
    assert set(runs.view.totals.bytes["site-a"].values()) == {0}
    assert runs.view.totals.frames == {"site-a": 0}
    assert list(runs.view.standing.sites) == ["site-a"]


def test_rounds_are_read_as_they_are_written(root: Path, runs: Runs) -> None:
    directory = run(root, [record(0, LOSSES)], rounds=3)
    runs.refresh()
    before = runs.view
    append(directory, record(1, {"site-a": 1.0, "site-b": 2.5}, best=1, degraded=True))
    assert runs.refresh()
    assert [one["round"] for one in before.rounds] == [0]
    assert [one["round"] for one in runs.view.rounds] == [0, 1]
    assert (before.totals.rounds["degraded"], runs.view.totals.rounds["degraded"]) == (0, 1)
    standing = runs.view.standing
    assert (standing.loss, standing.base_loss, standing.best_loss) == (1.75, 2.5, 1.75)
    assert (standing.best_round, standing.committed, standing.losses) == (1, 1, {0: 2.5, 1: 1.75})
    site = standing.sites["site-b"]
    assert (site.loss, site.base_loss, site.best_loss, site.round) == (2.5, 2.0, 2.0, 1)
    # 2026-01-01 and the phases before the evaluation: 0.1 + 12.4 + 0.2 seconds.
    assert standing.checkpoint_at == pytest.approx(1767225600 + 12.7)


@pytest.mark.parametrize(
    ("state", "cause", "reason"),
    [
        ("late", None, "late"),
        ("timeout", None, "timeout"),
        ("offline", "revoked", "offline"),
        ("error", "storage", "error"),
        ("error", "finite", "diverged"),
        ("invalid", "norm", "invalid"),
        ("invalid", "finite", "diverged"),
        # Records of older releases have no cause.
        ("error", None, "error"),
    ],
)
def test_a_drop_is_counted_by_its_reason(
    root: Path, runs: Runs, state: str, cause: str | None, reason: str
) -> None:
    run(root, [record(0, LOSSES), dropped(1, state, cause), record(2, LOSSES)])
    runs.refresh()
    assert runs.view.totals.drops == {"site-a": NO_DROPS, "site-b": {**NO_DROPS, reason: 1}}
    assert runs.view.totals.frames == {"site-a": 480, "site-b": 240}


def test_a_site_without_its_evaluation_leaves_losses_that_compare(root: Path, runs: Runs) -> None:
    """A killed site must not look like a loss that jumps."""
    apart = record(1, LOSSES, best=1)
    apart["sites"]["site-b"]["evaluate"] = evaluated(None)
    run(root, [record(0, LOSSES), apart])
    runs.refresh()
    standing = runs.view.standing
    assert (standing.loss, standing.base_loss, standing.best_loss) == (3.0, 3.0, 3.0)
    assert standing.sites["site-b"].loss == 2.0


def test_a_line_that_is_half_written_is_read_when_it_is_whole(root: Path, runs: Runs) -> None:
    directory = run(root, [record(0, LOSSES)], rounds=1)
    line = json.dumps({"schema": 2, **record(1, LOSSES)}) + "\n"
    with (directory / "rounds.jsonl").open("a") as file:
        file.write(line[:100])
        file.flush()
        runs.refresh()
        assert (len(runs.view.rounds), runs.view.unreadable) == (1, 0)
        file.write(line[100:])
    assert runs.refresh()
    assert (len(runs.view.rounds), runs.view.unreadable) == (2, 0)


def test_a_resumed_run_goes_on_where_its_last_whole_line_ended(root: Path, runs: Runs) -> None:
    directory = run(root, [record(0, LOSSES)], rounds=2, ended={"at": "x", "reason": "stopped"})
    with (directory / "rounds.jsonl").open("a") as file:
        file.write('{"schema": 2, "round": 1, "st')
    runs.refresh()
    append(directory, dropped(1, "timeout"))
    assert runs.refresh()
    assert [one["round"] for one in runs.view.rounds] == [0, 1]
    assert runs.view.totals.drops["site-b"]["timeout"] == 1


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"schema": 3, "round": 1}',
        '{"schema": 2, "round": 1}',
        '{"schema": 2, "round": "one", "sites": {}, "seconds": {}}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_line_that_cannot_be_read_is_counted_and_said_once(
    root: Path, runs: Runs, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = run(root, [record(0, LOSSES)], rounds=2)
    with (directory / "rounds.jsonl").open("a", errors="surrogateescape") as file:
        file.write(f"{line}\n")
    append(directory, record(1, LOSSES))
    with caplog.at_level(logging.ERROR):
        runs.refresh()
        runs.refresh()
    assert runs.view.unreadable == 1
    assert [one["round"] for one in runs.view.rounds] == [0, 1]
    assert runs.view.totals.rounds["committed"] == 1
    (said,) = caplog.messages
    assert said.startswith(f"Line 2 of {directory / 'rounds.jsonl'} ")


def test_a_state_that_no_site_ends_in_is_damage(root: Path, runs: Runs) -> None:
    run(root, [record(0, LOSSES), dropped(1, "asleep")])
    runs.refresh()
    assert runs.view.unreadable == 1
    assert sum(runs.view.totals.rounds.values()) == 0


@pytest.mark.parametrize(
    "config",
    [
        "",
        '{"schema": 1}',
        '{"schema": 2}',
        '{"schema": 2, "started_at": "yesterday", "config": {}, "sites": {}}',
        '{"schema": 2, "started_at": "2026-01-01T00:00:00+00:00", "config": {}, "sites": [1]}',
        '{"schema": 2, "started_at": "2026-01-01T00:00:00+00:00", "config": null}',
    ],
)
def test_a_run_whose_config_cannot_be_read_leaves_the_others(
    root: Path, runs: Runs, config: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(root, [record(0, LOSSES)], name="good")
    bad = root / "bad"
    bad.mkdir()
    (bad / "config.json").write_text(config)
    point(root / "latest", "bad")
    runs.refresh()
    assert runs.view.unreadable == 1
    assert str(bad / "config.json") in caplog.text
    assert runs.view.config is not None
    assert runs.view.config["run"] == "good"


def test_what_is_no_run_is_not_counted(root: Path, runs: Runs) -> None:
    (root / "notes").mkdir(parents=True)
    (root / "latest").symlink_to("gone")
    (root / "file").write_text("")
    runs.refresh()
    assert (runs.view.config, runs.view.unreadable) == (None, 0)


def test_the_view_follows_latest_and_counts_add_up(root: Path, runs: Runs) -> None:
    first = run(root, [record(0, LOSSES), dropped(1, "error")], name="1")
    runs.refresh()
    second = run(root, [], name="2", sites={"site-c": SITE})
    runs.refresh()
    view = runs.view
    assert view.config is not None
    assert (view.config["run"], view.rounds, list(view.standing.sites)) == ("2", (), ["site-c"])
    assert set(view.totals.drops) == {"site-a", "site-b", "site-c"}
    append(second, record(0, {"site-c": 1.0}), dropped(1, "late"))
    runs.refresh()
    assert runs.view.totals.rounds["committed"] == 2
    assert runs.view.totals.drops["site-b"] == {**NO_DROPS, "error": 1, "late": 1}
    # Back to the first: the same view as that of a process that starts now.
    point(root / "latest", first.name)
    runs.refresh()
    assert runs.view.config is not None
    assert runs.view.config["run"] == "1"
    again = Runs(root)
    again.refresh()
    assert runs.view == again.view


def test_no_counter_falls_when_a_run_is_deleted(root: Path, runs: Runs) -> None:
    """Prometheus takes a fall for a new beginning, and what is left for new events."""
    run(root, [record(0, LOSSES)], name="1")
    second = run(root, [record(0, LOSSES), dropped(1, "error", "finite")], name="2")
    runs.refresh()
    totals = runs.view.totals
    kept = root.parent / "kept"
    shutil.copytree(second, kept)
    shutil.rmtree(second)
    assert runs.refresh()
    assert runs.view.totals == totals
    # 'latest' leads nowhere: the run that is left is the newest.
    assert runs.view.config is not None
    assert runs.view.config["run"] == "1"
    # Brought back, it is read again and counted no second time.
    shutil.copytree(kept, second)
    runs.refresh()
    assert runs.view.totals == totals
    assert runs.view.config["run"] == "2"
    assert len(runs.view.rounds) == 2
    append(second, dropped(2, "error", "finite"))
    runs.refresh()
    assert runs.view.totals.drops["site-b"]["diverged"] == 2


def test_a_site_s_own_count_of_restarts_is_the_newest(root: Path, runs: Runs) -> None:
    """Runs are read in the order of their names, which is not that of their times."""
    late = record(1, LOSSES, started_at="2026-02-01T00:00:00+00:00")
    late["sites"]["site-a"]["train"] = trained(trainer_restarts=2)
    early = record(1, LOSSES)
    early["sites"]["site-a"]["train"] = trained(trainer_restarts=7)
    run(root, [record(0, LOSSES), late], name="1")
    run(root, [record(0, LOSSES), early], name="2")
    runs.refresh()
    assert {site: told for site, (_, told) in runs.view.totals.restarts.items()} == {"site-a": 2.0}


def test_only_the_last_rounds_are_kept_whole(root: Path, runs: Runs) -> None:
    run(root, [record(number, {"site-a": 9.0 - number / 10}, best=number) for number in range(50)])
    runs.refresh()
    assert [one["round"] for one in runs.view.rounds] == list(range(30, 50))
    assert list(runs.view.standing.losses) == list(range(30, 50))
    assert runs.view.standing.base_loss == 9.0
    assert runs.view.totals.rounds["committed"] == 49


PROGRESS = {
    "schema": 1,
    "run": "17",
    "round": 1,
    "rounds": 2,
    "phase": "collect",
    "since": 5.0,
    "sites": {},
}


def test_what_a_serverapp_says_is_taken(root: Path, runs: Runs) -> None:
    directory = run(root, [record(0, LOSSES)], rounds=2)
    said = RunProgress(directory, directory.name, 2, 1)
    said.enter("collect", 1)
    said.asked("train", LOSSES)
    said.ended("site-b", "timeout", "no reply within 600 s")
    runs.refresh()
    progress = runs.view.progress
    assert progress is not None
    assert (progress["phase"], progress["round"]) == ("collect", 1)
    states = {name: (site["kind"], site["state"]) for name, site in progress["sites"].items()}
    assert states == {"site-a": ("train", "working"), "site-b": ("train", "timeout")}
    said.close()
    assert runs.refresh()
    assert runs.view.progress is not None
    assert (runs.view.progress["phase"], runs.view.progress["sites"]) == ("done", {})


def test_progress_is_followed(root: Path, runs: Runs) -> None:
    directory = run(root, [record(0, LOSSES)])
    path = directory / "progress.json"
    runs.refresh()
    assert runs.view.progress is None
    path.write_text(json.dumps(PROGRESS))
    assert runs.refresh()
    assert runs.view.progress == PROGRESS
    path.unlink()
    assert runs.refresh()
    assert runs.view.progress is None


@pytest.mark.parametrize(
    "changed",
    [{"schema": 2}, {"run": "16"}, {"since": None}, {"sites": []}, {"sites": {"site-a": 1}}],
)
def test_progress_of_another_release_or_run_is_not_taken(
    root: Path, runs: Runs, changed: dict[str, Any]
) -> None:
    directory = run(root, [record(0, LOSSES)])
    (directory / "progress.json").write_text(json.dumps({**PROGRESS, **changed}))
    runs.refresh()
    assert (runs.view.progress, runs.view.unreadable) == (None, 0)


def test_what_may_not_be_read_is_unreadable(
    root: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode will not do: tests may run as root."""
    directory = run(root, [record(0, LOSSES)])
    stat = Path.stat

    def refused(path: Path, **options: Any) -> os.stat_result:
        if path.parent == directory:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    def closed(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", refused)
        patched.setattr(Path, "open", closed)
        patched.setattr(Path, "read_text", closed)
        runs.refresh()
        assert (runs.view.config, runs.view.unreadable) == (None, 1)
    runs.refresh()
    assert (runs.view.unreadable, len(runs.view.rounds)) == (0, 1)


def test_hundreds_of_runs_are_looked_at_and_not_read_again(
    root: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run(root, [record(0, LOSSES), record(1, LOSSES)], name="0")
    for number in range(1, 300):
        shutil.copytree(directory, root / str(number))
    runs.refresh()
    assert runs.view.totals.rounds["committed"] == 300
    parsed: list[str] = []

    def noting(text: str, where: str) -> dict[str, Any]:
        parsed.append(where)
        return parse(text, where)

    monkeypatch.setattr("app.runs_view.parse", noting)
    assert not runs.refresh()
    append(root / "200", record(2, LOSSES))
    runs.refresh()
    assert runs.view.totals.rounds["committed"] == 301
    # The one that is written becomes the newest, and is read from its beginning once.
    assert parsed == [f"Line {n} of {root / '200' / 'rounds.jsonl'}" for n in (1, 2, 3)]
