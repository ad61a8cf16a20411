"""The SuperLink's own evaluation: in another process the same numbers, and a reason where there are none."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import tensorfile
from app.checkpoint import Checkpoint
from app.config import RunConfig
from app.dataset import open_dataset
from app.policy import trainable_names
from app.server_evaluation import Evaluation, start
from app.statistics import moments_of, normalisation
from tests.damage import data, edit_column, edit_info

CONFIG = RunConfig(batch_size=5, eval_batches=2, seed=3)
# Seconds that no test should need: a process of its own imports lerobot.
PATIENCE = 300
NOTHING = {"loss": None, "rmse_deg": None, "frames": None}


def _checkpoint(folder: Path, base: Path, dataset: Path, *, scale: float = 1.0) -> Path:
    """The tiny model as round 1, its trainable tensors multiplied by ``scale``."""
    tensors = tensorfile.read(base / "model.safetensors", trainable_names(base))
    statistics = normalisation(moments_of(open_dataset(str(dataset), held_out=0.25, seed=0)))
    with Checkpoint(
        folder,
        1,
        base=base,
        shapes={name: array.shape for name, array in tensors.items()},
        states=(),
        normalisation=statistics,
    ) as checkpoint:
        for name, array in tensors.items():
            checkpoint.put(name, array * np.float32(scale))
        checkpoint.finish({"round": 1}, None)
    return folder / "round-0001"


@pytest.fixture(scope="module")
def checkpoint(
    tiny_base: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("run"), tiny_base, tiny_dataset)


def test_another_process_measures_the_same_and_survives_bad_datasets(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    from app.evaluation import evaluate
    from app.frames import Frames
    from app.policy import load_policy, load_processors

    broken = tmp_path / "broken"
    shutil.copytree(tiny_dataset, broken)
    edit_column(data(broken), "action", lambda rows: [[np.nan] * 6] * len(rows))
    good, part, absent = str(tiny_dataset), f"{tiny_dataset}#episodes=1:3", str(tmp_path / "absent")
    results = start(checkpoint, [absent, good, str(broken), part, good], CONFIG).result(PATIENCE)

    assert set(results) == {absent, good, str(broken), part}
    assert results[absent].pop("reason").endswith("does not exist: check the path.")
    assert "values of action that are not finite" in results[str(broken)].pop("reason")
    assert results[absent] == results[str(broken)] == NOTHING

    policy = load_policy(checkpoint, "cpu")
    opened = open_dataset(good, held_out=0.25, seed=0)
    processors = load_processors(checkpoint, policy, normalisation(moments_of(opened)))
    for uri, episodes in ((good, (0, 1, 2, 3)), (part, (1, 2))):
        # No site trains on them: all episodes count, not a held-out part.
        frames = Frames(opened, episodes)
        # Other batches of the same ten frames.
        expected = evaluate(policy, processors, frames, batch_size=2, batches=5, seed=3)
        assert results[uri]["reason"] is None
        assert results[uri]["frames"] == expected.frames == 10
        assert results[uri]["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert results[uri]["rmse_deg"] == pytest.approx(expected.rmse_deg, rel=1e-6)


def test_a_model_that_diverged_has_no_loss(
    tiny_base: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    checkpoint = _checkpoint(tmp_path, tiny_base, tiny_dataset, scale=1e30)
    (result,) = start(checkpoint, [str(tiny_dataset)], CONFIG).result(PATIENCE).values()
    assert result == {**NOTHING, "reason": "The model's loss or error is not finite."}


def test_a_dataset_that_breaks_the_contract_is_a_reason(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny_dataset, old)
    edit_info(old, lambda info: info.update(codebase_version="v2.1"))
    uris = [str(old), f"{tiny_dataset}#frames=1:2"]
    evaluation = start(checkpoint, uris, CONFIG)
    results = evaluation.result(PATIENCE)
    assert "is a LeRobot v2.1 dataset" in results[uris[0]].pop("reason")
    assert "write '#episodes=A:B'" in results[uris[1]].pop("reason")
    assert results == dict.fromkeys(uris, NOTHING)
    assert evaluation.process.returncode == 0


def test_a_checkpoint_that_cannot_be_read_is_a_reason(tiny_dataset: Path, tmp_path: Path) -> None:
    (result,) = start(tmp_path / "none", [str(tiny_dataset)], CONFIG).result(PATIENCE).values()
    assert "policy_preprocessor.json does not name the statistics" in result.pop("reason")
    assert result == NOTHING


def test_what_is_not_done_in_time_is_ended(checkpoint: Path, tiny_dataset: Path) -> None:
    evaluation = start(checkpoint, [str(tiny_dataset)], CONFIG)
    (result,) = evaluation.result(0).values()
    assert result == {**NOTHING, "reason": "The evaluation was not done within 0 s."}
    assert evaluation.process.returncode == -signal.SIGKILL


def test_a_killed_evaluation_is_a_reason(checkpoint: Path, tiny_dataset: Path) -> None:
    evaluation = start(checkpoint, [str(tiny_dataset)], CONFIG)
    evaluation.process.kill()
    (result,) = evaluation.result(PATIENCE).values()
    assert "ended early with exit code -9" in result.pop("reason")
    assert result == NOTHING


def test_what_was_measured_before_the_end_is_kept() -> None:
    """Half a line, as a process leaves it that is killed while it writes, is not a result."""
    line = '{"done": {"loss": 1.5, "rmse_deg": [1, 2, 3, 4, 5, 6], "frames": 7, "reason": null}}'
    code = f"print('''{line}''', flush=True); print('''{line[:20]}''', end='', flush=True); 1 / 0"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    results: dict[str, Any] = Evaluation(process, ("done", "other")).result(PATIENCE)
    assert results["done"]["loss"] == 1.5
    assert results["done"]["reason"] is None
    assert "exit code 1" in results["other"].pop("reason")
    assert results["other"] == NOTHING


def test_it_ends_with_the_process_that_started_it(tiny_dataset: Path, tmp_path: Path) -> None:
    """The ServerApp may be killed at any time; nothing of it may run on."""
    # A pipe as the dataset's info.json: the evaluation stands still where it opens it, until it is killed.
    root = tmp_path / "pipe"
    shutil.copytree(tiny_dataset, root)
    (root / "meta" / "info.json").unlink()
    os.mkfifo(root / "meta" / "info.json")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from app.config import RunConfig; from app.server_evaluation import start\n"
        "evaluation = start(Path('none'), [sys.argv[1]], RunConfig())\n"
        "print(evaluation.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE)
    assert parent.stdout
    child = int(parent.stdout.readline())
    # Once the evaluation reads from the pipe, it has asked the kernel to end with its parent.
    with (root / "meta" / "info.json").open("w"):
        parent.kill()
        parent.wait()
        parent.stdout.close()
        deadline = time.monotonic() + PATIENCE
        while _lives(child):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _lives(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
