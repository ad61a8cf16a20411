"""The Docker engine, the images and the datasets the container tests run on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docker.compose_project import ROOT, Project


def _bash(script: str, *arguments: str, timeout: float) -> None:
    result = subprocess.run(
        ["bash", f"docker/{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers; on a machine without one the test is skipped, in CI it fails."""
    answers = (
        shutil.which("docker") is not None
        and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    )
    if not answers and not os.environ.get("CI"):
        pytest.skip("no Docker engine answers: run 'bash docker/install-engine.sh' to have one")
    assert answers, "no Docker engine answers"


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """The three images, built from this checkout; the first build of the app image takes minutes."""
    _bash("build-images.sh", timeout=1500)


@pytest.fixture(scope="session")
def monitoring_images(images: None) -> dict[str, str]:
    """The pinned Prometheus and Alertmanager, or their stand-in from Debian's packages where no registry answers."""
    stand_in = "vlafleet-prometheus:test"
    services = Project("vlafleet", {}).config()["services"]
    found = {}
    for name in ("prometheus", "alertmanager"):
        pinned: str = services[name]["image"]
        pull = ["docker", "pull", "--quiet", pinned]
        done = subprocess.run(pull, capture_output=True, check=False, timeout=300)
        found[f"{name.upper()}_IMAGE"] = stand_in if done.returncode else pinned
    if stand_in in found.values():
        _bash("prometheus-image.sh", stand_in, timeout=300)
    return found


@pytest.fixture(scope="session")
def demo_datasets() -> Path:
    """The demo's datasets (site-a, site-b), made once and kept like ``make data`` keeps them."""
    from app.demo_data import make_sites

    directory = ROOT / "data" / "demo"
    make_sites(directory, ["site-a", "site-b"])
    return directory


@pytest.fixture(scope="session")
def project(
    monitoring_images: dict[str, str], demo_datasets: Path, free_port: Callable[[], int]
) -> Project:
    """A compose project of its own, on free ports."""
    return Project(
        f"vlafleet-test-{os.getpid()}",
        {
            **monitoring_images,
            "VLAFLEET_DATA": str(demo_datasets),
            "VLAFLEET_SUPERLINK_PORT": str(free_port()),
            "VLAFLEET_ENROLMENT_PORT": str(free_port()),
            "VLAFLEET_PROMETHEUS_PORT": str(free_port()),
            "VLAFLEET_ALERTMANAGER_PORT": str(free_port()),
            "VLAFLEET_GRAFANA_PORT": str(free_port()),
        },
    )
