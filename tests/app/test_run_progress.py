"""What a run says of itself while it runs is whole at any moment, and no run depends on it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from app.run_progress import FILE, RunProgress


def said(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / FILE).read_text())
    return found


def test_phases_and_ends_are_there_as_soon_as_they_are(tmp_path: Path) -> None:
    before = time.time()
    progress = RunProgress(tmp_path, "17", rounds=3, number=0)
    first = said(tmp_path)
    assert before <= first.pop("since") <= time.time()
    assert first == {
        "schema": 1,
        "run": "17",
        "round": 0,
        "rounds": 3,
        "phase": "wait",
        "sites": {},
    }
    progress.enter("describe")
    progress.asked("describe", ["node-2", "site-a"])
    asked = said(tmp_path)
    assert (asked["phase"], asked["round"]) == ("describe", 0)
    assert list(asked["sites"]) == ["node-2", "site-a"]
    assert {(s["kind"], s["state"], s["reason"]) for s in asked["sites"].values()} == {
        ("describe", "working", None)
    }
    # Only its answer told what it is called.
    progress.ended("node-2", "completed", None, name="site-b")
    progress.ended("site-a", "error", "The disk is full.")
    ended = said(tmp_path)
    assert {name: (s["state"], s["reason"]) for name, s in ended["sites"].items()} == {
        "site-a": ("error", "The disk is full."),
        "site-b": ("completed", None),
    }
    assert ended["sites"]["site-a"]["since"] >= asked["sites"]["site-a"]["since"]
    # The phase is as old as before: a site's end does not make it new.
    assert ended["since"] == asked["since"]
    progress.enter("collect", 1)
    progress.asked("train", ["site-b"])
    assert (said(tmp_path)["round"], list(said(tmp_path)["sites"])) == (1, ["site-b"])
    progress.close()
    assert (said(tmp_path)["phase"], said(tmp_path)["sites"]) == ("done", {})


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    names = [f"site-{n}" for n in range(50)]
    progress = RunProgress(tmp_path, "17", rounds=1, number=0)
    progress.asked("train", names)
    halves = (names[:25], names[25:])

    def end(mine: list[str]) -> None:
        for name in mine:
            progress.ended(name, "late", "slow")

    threads = [threading.Thread(target=end, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert said(tmp_path)["sites"].keys() == set(names)
    assert {site["state"] for site in said(tmp_path)["sites"].values()} == {"late"}


def test_a_run_goes_on_where_it_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    progress = RunProgress(tmp_path / "gone", "17", rounds=1, number=0)
    progress.asked("train", ["site-a"])
    progress.ended("site-a", "completed", None)
    # Said once, not at every phase.
    (line,) = [message for message in caplog.messages if FILE in message]
    assert line.endswith("cannot be written: [Errno 2] No such file or directory: "
                         f"'{tmp_path}/gone/.{FILE}.tmp'")  # fmt: skip
