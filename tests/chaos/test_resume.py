"""A run that was killed anywhere and resumed ends where the uninterrupted one does, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.tiny_base import ensure_tiny_base

# A kill is tried at every how-manieth step of each phase, from its first: about 70 in all.
STRIDE = 5


@pytest.mark.slow
def test_a_kill_at_any_step_changes_nothing(tmp_path: Path) -> None:
    base = ensure_tiny_base(tmp_path / "models")
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.crash", str(base), str(tmp_path), str(STRIDE)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *tries = [json.loads(line) for line in done.stdout.splitlines()]
    # One round failed at every site and left the model as it was; the others moved it.
    zero, one, two, three = whole["outcome"]["models"]
    assert two == one
    assert len({zero, one, three}) == 3
    assert whole["outcome"]["committed"] == [True, True, False, True]
    killed = [found for found in tries if found["killed"]]
    # Replies come in no order: a phase that waits for them may be over before its step is reached.
    assert len(killed) >= 30
    phases = {found["killed"].removeprefix("killed in ") for found in killed}
    assert phases >= {
        "start",
        "select",
        "dispatch",
        "collect",
        "commit",
        "fail",
        "evaluate",
        "done",
    }
    for found in tries:
        assert found["outcome"] == whole["outcome"], found["kill"]
