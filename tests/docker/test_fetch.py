"""docker/fetch.sh with a hub of this test's own: what is fetched, what is not asked for again, what is waited for."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "fetch.sh"
# In the place of the app image's commands: each notes what it was asked for; hf is cut off where "cut" is in a name.
PYTHON = """\
#!/bin/sh
echo "model $3" >> "$ASKED"
"""
HF = """\
#!/bin/sh
echo "dataset $2" >> "$ASKED"
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2/.cache" "$2/data"
case $2 in *cut*) exit 3 ;; esac
mkdir "$2/meta" && touch "$2/meta/info.json"
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A directory with the script, which fetches into ``fetched`` beside it, and the commands it calls."""
    for name, text in (("python", PYTHON), ("hf", HF)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = SCRIPT.read_text()
    assert "/fetched" in script
    (tmp_path / "fetch.sh").write_text(script.replace("/fetched", str(tmp_path / "fetched")))
    return tmp_path


def start(hub: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the script."""
    environment = {**os.environ, "PATH": f"{hub}:{os.environ['PATH']}", "ASKED": str(hub / "asked")}
    return subprocess.Popen(
        ["sh", "fetch.sh", *arguments],
        cwd=hub,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def fetch(hub: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run the script; return its status and what it asked the hub for."""
    (hub / "asked").unlink(missing_ok=True)
    with start(hub, *arguments) as process:
        process.communicate(timeout=30)
    asked = hub / "asked"
    return process.returncode, asked.read_text().splitlines() if asked.exists() else []


def test_models_and_datasets_are_fetched_once(hub: Path) -> None:
    wanted = ("a/one", "b/two", "--", "c/three", "d/four")
    assert fetch(hub, *wanted) == (
        0,
        ["model a/one", "model b/two", "dataset c/three", "dataset d/four"],
    )
    assert (hub / "fetched/datasets/c/three/meta/info.json").exists()
    assert not (hub / "fetched/datasets/c/three/.cache").exists()
    assert fetch(hub, *wanted) == (0, [])
    # Another one is added: only that is asked for. Either kind may be missing.
    assert fetch(hub, *wanted, "e/five") == (0, ["dataset e/five"])
    assert fetch(hub, "f/six") == (0, ["model f/six"])
    assert fetch(hub, "--", "g/seven") == (0, ["dataset g/seven"])


def test_a_dataset_that_was_cut_off_is_not_there(hub: Path) -> None:
    assert fetch(hub, "--", "a/cut") == (3, ["dataset a/cut"])
    assert not (hub / "fetched/datasets/a/cut").exists()
    assert fetch(hub, "--", "a/cut") == (3, ["dataset a/cut"])


def test_a_directory_that_was_mounted_too_early_is_filled(hub: Path) -> None:
    (hub / "fetched/datasets/a/one").mkdir(parents=True)
    assert fetch(hub, "--", "a/one") == (0, ["dataset a/one"])
    assert (hub / "fetched/datasets/a/one/meta/info.json").exists()


def test_who_waits_asks_nothing_and_goes_on_when_it_is_there(hub: Path) -> None:
    waiting = start(hub, "--wait", "a/one", "--", "b/two")
    try:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waiting for the model a/one\n"
        assert waiting.poll() is None
        assert not (hub / "asked").exists()
        assert fetch(hub, "a/one", "--", "b/two") == (0, ["model a/one", "dataset b/two"])
        rest, _ = waiting.communicate(timeout=30)
    finally:
        if waiting.poll() is None:
            os.killpg(waiting.pid, signal.SIGKILL)
            waiting.wait()
    assert waiting.returncode == 0
    assert "the dataset b/two" in rest
