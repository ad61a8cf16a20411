"""Prometheus, promtool, Alertmanager and amtool for the tests: from PATH, else from Debian's packages."""

from pathlib import Path

from tests.tools import fetched


def prometheus_tools() -> Path:
    """Return a directory with the four programs, as ``fetched`` does."""
    return fetched("docker/prometheus-tools.sh", "prometheus")
