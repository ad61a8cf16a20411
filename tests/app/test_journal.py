"""The record of a run is complete, versioned and on disk."""

import json
import math
import os
from pathlib import Path

import pytest

from app.journal import Journal, read_config, read_rounds, runs_root, unfinished
from certs.errors import RunFailedError, StorageError


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "17")
    journal.describe({"run": "17", "config": {"rounds": 2}})
    for number in range(3):
        journal.append({"round": number, "aggregate": {"loss": 1.5 - number / 4}})
    assert read_config(tmp_path / "17") == {"schema": 2, "run": "17", "config": {"rounds": 2}}
    assert [record["round"] for record in read_rounds(tmp_path / "17")] == [0, 1, 2]
    assert all(record["schema"] == 2 for record in read_rounds(tmp_path / "17"))


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "17")
    journal.append({"loss": None, "rmse_deg": [math.nan, 1.0], "grad_norm": math.inf})
    assert read_rounds(journal.directory) == [
        {"schema": 2, "loss": None, "rmse_deg": [None, 1.0], "grad_norm": None}
    ]
    assert "NaN" not in (journal.directory / "rounds.jsonl").read_text()


def test_latest_is_the_last_run_started(tmp_path: Path) -> None:
    for run in ("17", "18"):
        Journal(tmp_path, run)
    assert os.readlink(tmp_path / "latest") == "18"


def test_a_record_is_on_disk_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "17")
    synced: list[str] = []
    fsync = os.fsync

    def recording(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    journal.append({"round": 0})
    assert str(journal.directory / "rounds.jsonl") in synced
    assert str(journal.directory) in synced


def test_a_line_cut_off_by_a_crash_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "17")
    journal.append({"round": 0})
    with (journal.directory / "rounds.jsonl").open("a") as file:
        file.write('{"schema": 1, "rou')
    assert [record["round"] for record in read_rounds(journal.directory)] == [0]
    # The one who goes on writing removes it, or the next record would be glued to it.
    journal.close()
    again = Journal(tmp_path, "17")
    again.append({"round": 1})
    assert [record["round"] for record in read_rounds(journal.directory)] == [0, 1]


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "17")
    with pytest.raises(StorageError, match="Another ServerApp still works on the run"):
        Journal(tmp_path, "17")
    Journal(tmp_path, "18")
    journal.close()
    Journal(tmp_path, "17")


def test_the_run_to_resume_is_the_newest(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="no run to resume"):
        unfinished(tmp_path)
    for run in ("17", "18"):
        Journal(tmp_path, run)
    assert unfinished(tmp_path) == "18"


def test_what_is_not_a_run_is_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="holds no run"):
        read_config(tmp_path / "none")
    assert read_rounds(tmp_path / "none") == []
    journal = Journal(tmp_path, "17")
    for text, expected in [
        ("{", "is not JSON"),
        ("[]", "has version None"),
        (json.dumps({"schema": 1}), "has version 1, this vlafleet reads 2"),
    ]:
        (journal.directory / "config.json").write_text(text)
        with pytest.raises(RunFailedError, match=expected):
            read_config(journal.directory)
        (journal.directory / "rounds.jsonl").write_text(f'{{"schema": 2}}\n{text}\n')
        with pytest.raises(RunFailedError, match=rf"Line 2 of .*rounds.jsonl {expected}"):
            read_rounds(journal.directory)
    (journal.directory / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RunFailedError, match="cannot be read"):
        read_config(journal.directory)


def test_runs_go_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_RUNS", str(tmp_path))
    assert runs_root() == tmp_path
    monkeypatch.delenv("VLAFLEET_RUNS")
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path / "runs"


def test_a_directory_that_cannot_be_made_is_one_sentence() -> None:
    with pytest.raises(StorageError, match="directory /proc/none/7 cannot be made") as caught:
        Journal(Path("/proc/none"), "7")
    assert "\n" not in str(caught.value)
