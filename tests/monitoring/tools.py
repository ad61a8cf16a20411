"""Prometheus, promtool, Alertmanager and amtool for the tests: from PATH, else from Debian's packages."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def prometheus_tools() -> Path:
    """Return a directory with the four programs, kept between test runs; without them the test is skipped, in CI it
    fails.
    """
    directory = ROOT / ".cache" / "prometheus"
    result = subprocess.run(
        ["bash", "docker/prometheus-tools.sh", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if result.returncode and not os.environ.get("CI"):
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return directory
