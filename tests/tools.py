"""Programs that the tests run and a script of the project fetches, kept between test runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def fetched(script: str, name: str) -> Path:
    """Return the directory of ``.cache`` that a script fills with programs; when it cannot, the test is skipped, and in
    CI it fails.
    """
    directory = ROOT / ".cache" / name
    result = subprocess.run(
        ["bash", script, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if result.returncode and not os.environ.get("CI"):
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return directory
