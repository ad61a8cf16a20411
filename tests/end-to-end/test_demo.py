"""``make demo`` as a newcomer runs it: real data, real Flower, mutual TLS, and a model at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from superlink.control import run_request
from superlink.demo import federation

pytestmark = [pytest.mark.federation, pytest.mark.sim, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# The smallest run: every phase happens, nothing is learnt.
TINY = "rounds=1 local-steps=2 batch-size=1 eval-batches=8"


def demo(port: int, runs: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo on ``port``; its data is shared with 'make demo', its results go to ``runs``."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vlafleet", "demo", "--port", str(port), "--runs", str(runs)),
            *("--directory", str(runs.parent / "federation"), *arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(marker: str) -> list[str]:
    """The command lines of the processes that mention ``marker``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if marker in line and str(os.getpid()) != entry.parent.name:
            found.append(line)
    return found


def assert_nothing_left(port: int, runs: Path) -> None:
    assert children(str(runs.parent / "federation")) == []
    for number in (port, port + 1, port + 2):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number)) != 0, f"port {number} is still open"


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> tuple[str, Path, int]:
    """The demo with its own defaults: three rounds at two sites."""
    runs = tmp_path_factory.mktemp("demo") / "runs"
    port = free_port()
    process = demo(port, runs)
    output, _ = process.communicate(timeout=850)
    assert process.returncode == 0, output
    assert_nothing_left(port, runs)
    return output, runs, port


def test_every_site_gets_better(finished: tuple[str, Path, int]) -> None:
    output, runs, _ = finished
    records = [
        json.loads(line) for line in (runs / "latest" / "rounds.jsonl").read_text().splitlines()
    ]
    assert [record["round"] for record in records] == [0, 1, 2, 3]
    assert all(record["committed"] for record in records)
    for site in ("site-a", "site-b"):
        losses = [record["sites"][site]["evaluate"]["loss"] for record in records]
        assert losses[3] < losses[0], losses
        assert f"{losses[3]:.3f}" in output
    assert "round-0003" in output


def test_frozen_tensors_never_cross_the_wire(finished: tuple[str, Path, int]) -> None:
    _, runs, _ = finished
    from safetensors import safe_open

    record = json.loads((runs / "latest" / "rounds.jsonl").read_text().splitlines()[-1])
    with safe_open(runs / "latest" / "checkpoints" / "latest" / "model.safetensors", "np") as file:
        values = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    import math

    trainable = sum(
        math.prod(shape) for name, shape in values.items() if ".vlm_with_expert.vlm." not in name
    )
    everything = sum(math.prod(shape) for shape in values.values())
    assert trainable < everything
    for site in record["sites"].values():
        # A byte for each value, and scales, which weigh more in a tiny model's short rows.
        assert trainable < site["train"]["bytes_up"] < 1.2 * trainable
        # The round's model went out once, to be evaluated; the next round finds it at the site.
        assert site["train"]["bytes_down"] == 0
        assert site["evaluate"]["bytes_down"] == site["train"]["bytes_up"]


def test_the_checkpoint_opens_and_predicts(finished: tuple[str, Path, int]) -> None:
    """Strict loading, and a chunk of actions in degrees from the checkpoint's own processors."""
    _, runs, _ = finished
    code = """
import sys, torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
path = sys.argv[1]
policy = SmolVLAPolicy.from_pretrained(path, strict=True).eval()
pre, post = make_pre_post_processors(policy.config, pretrained_path=path)
frame = {"observation.state": torch.zeros(6), "task": "Pick up the block."}
frame |= {f"observation.images.camera{i}": torch.rand(3, 96, 128) for i in (1, 2)}
chunk = post(policy.predict_action_chunk(pre(frame)))
assert chunk.shape == (1, policy.config.chunk_size, 6), chunk.shape
assert torch.isfinite(chunk).all()
assert chunk.abs().max() > 5, "actions are degrees, not normalised values"
"""
    checkpoint = runs / "latest" / "checkpoints" / "latest"
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_everything_and_a_second_run_works(finished: tuple[str, Path, int]) -> None:
    _, runs, port = finished
    process = demo(port, runs, "-c", TINY)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if (
            "evaluate: " in line or "ready after" in line
        ):  # a ClientApp is in the middle of its work
            break
    assert children(str(runs.parent / "federation")), lines
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(lines) + rest
    assert "Traceback" not in rest
    assert_nothing_left(port, runs)

    process = demo(port, runs, "-c", TINY)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_nothing_left(port, runs)
    assert len([path for path in runs.iterdir() if path.name != "latest"]) == 3


def test_killed_outright_leaves_nothing(finished: tuple[str, Path, int]) -> None:
    """Even SIGKILL of the demo ends its processes: the kernel tells them that their parent is gone."""
    _, runs, port = finished
    process = demo(port, runs, "-c", TINY)
    assert process.stdout is not None
    for line in process.stdout:
        if "online" in line:
            break
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while children(str(runs.parent / "federation")):
        assert time.monotonic() < deadline, children(str(runs.parent / "federation"))
        time.sleep(0.5)
    assert_nothing_left(port, runs)


def app_with_code(directory: Path) -> Path:
    """An app whose bundle holds a ServerApp that would run in place of the installed one."""
    (directory / "app").mkdir(parents=True)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'fab-include = ["pyproject.toml"]' in project
    project = project.replace(
        'fab-include = ["pyproject.toml"]', 'fab-include = ["**/*.py", "pyproject.toml"]'
    )
    (directory / "pyproject.toml").write_text(project)
    code = f"open({str(directory.parent / 'smuggled')!r}, 'w')"
    (directory / "app" / "server_app.py").write_text(code)
    return directory


def test_runs_that_must_fail_say_why(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """A dataset that is not there, a value out of range, code of its own: a sentence each in the run's status."""
    port = free_port()
    datasets = {"site-a": str(tmp_path / "nowhere"), "site-b": "hf:nobody/nothing"}
    with federation(tmp_path / "federation", datasets, tmp_path / "runs", port) as (
        control,
        processes,
    ):
        run_id = control.start(run_request(ROOT, [TINY]))
        log = "".join(control.follow(run_id))
        status = control.status(run_id)
        site_log = (processes.logs / "superexec-site-a.log").read_text()
        wrong = control.start(run_request(ROOT, [TINY, "batch-size=0"]))
        "".join(control.follow(wrong))
        out_of_range = control.status(wrong)
        smuggler = control.start(run_request(app_with_code(tmp_path / "smuggler"), [TINY]))
        "".join(control.follow(smuggler))
        refused = control.status(smuggler)
    assert (status.status, status.sub_status) == ("finished", "failed")
    assert f"site-a: dataset directory {tmp_path / 'nowhere'} does not exist" in status.details
    assert "site-b: " in status.details
    assert "nobody/nothing" in status.details
    assert "Traceback" not in log
    assert "Traceback" not in site_log
    assert not (tmp_path / "nowhere").exists()
    assert (out_of_range.status, out_of_range.sub_status) == ("finished", "failed")
    assert "batch-size" in out_of_range.details
    assert (refused.status, refused.sub_status) == ("finished", "failed")
    assert "carries app/server_app.py; a site runs only the code installed there" in refused.details
    assert not (tmp_path / "smuggled").exists()
    assert_nothing_left(port, tmp_path / "runs")
