"""compose.gpu.yaml without GPU and hub: what ``fetch`` fetched once serves a whole run, read-only and offline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docker.compose_project import Project, docker

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

# The layout of a hub cache (huggingface_hub) with the tiny model in the real one's place, and of fetch.sh's datasets.
FETCHED = """
set -e
model=/fetched/models/models--lerobot--smolvla_base
mkdir -p $model/refs $model/snapshots/0 /fetched/datasets/lerobot
printf 0 > $model/refs/main
cp -r "$VLAFLEET_HOME"/models/tiny/base/. $model/snapshots/0
touch /fetched/models/.complete-lerobot-smolvla_base
cp -r /demo/site-a /fetched/datasets/lerobot/svla_so100_pickplace
cp -r /demo/site-b /fetched/datasets/lerobot/svla_so100_stacking
"""
SERVICES = [
    "pki", "fetch", "superlink", "superexec", "register",
    "site-a", "site-a-app", "site-b", "site-b-app", "run",
]  # fmt: skip


@pytest.fixture
def fetched(project: Project, demo_datasets: Path) -> Iterator[Project]:
    """A project whose volume holds what ``fetch`` would have fetched."""
    files = ("compose.yaml", "compose.gpu.yaml", "tests/docker/no-gpu.yaml")
    gpu = replace(project, name=f"{project.name}-gpu", files=files)
    try:
        gpu.output("create", "--no-build", "fetch")
        docker(
            "run", "--rm", "--network", "none",
            "--volume", f"{gpu.name}_fetched:/fetched", "--volume", f"{demo_datasets}:/demo:ro",
            "--entrypoint", "sh", "vlafleet-app:0.1.0", "-c", FETCHED,
        )  # fmt: skip
        yield gpu
    finally:
        gpu.compose("down", "--volumes", "--timeout", "10")


def test_a_run_takes_model_and_datasets_from_what_was_fetched(fetched: Project) -> None:
    fetched.output("up", "--detach", "--no-build", *SERVICES, timeout=300)
    run = fetched.compose("wait", "run", timeout=600)
    assert run.returncode == 0, fetched.output("logs", "--no-color", "--tail", "40")
    # Nothing was asked of the hub again: fetch found everything and ended well without a route to it.
    said = fetched.output("logs", "--no-color", "fetch")
    assert "fetching" not in said
    assert said.count("there: the dataset") == 2
    assert fetched.containers()["fetch"]["ExitCode"] == 0
    log = fetched.output("logs", "--no-color", "run")
    assert "model lerobot/smolvla_base" in log
    assert "1 of 1 rounds committed" in log
