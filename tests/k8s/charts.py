"""The charts as Helm renders them, for the tests."""

import functools
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.tools import fetched

ROOT = Path(__file__).parents[2]
CHARTS = ("superlink", "site")
# The namespace and the release that the tests install, as an operator might name them.
NAMESPACE = "vlafleet"
RELEASES = {"superlink": "fed", "site": "vlafleet-lab-7"}

# A manifest: one object of Kubernetes.
Manifest = dict[str, Any]


@functools.cache
def tools() -> Path:
    """Return a directory with helm and kubectl, as ``fetched`` does."""
    return fetched("k8s/tools.sh", "kubernetes")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm; return what it printed and its exit code."""
    return subprocess.run(
        [tools() / "helm", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def template(
    chart: str,
    values: Path | Mapping[str, Any],
    *,
    release: str | None = None,
    namespace: str = NAMESPACE,
    options: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run ``helm template`` on a chart of ``k8s/`` with a file of values, or with these."""
    with tempfile.TemporaryDirectory() as scratch:
        if not isinstance(values, Path):
            given, values = values, Path(scratch) / "values.yaml"
            values.write_text(yaml.safe_dump(dict(given)))
        return helm(
            *("template", release or RELEASES[chart], f"k8s/{chart}", "--namespace", namespace),
            *("--values", str(values), *options),
        )


def render(
    chart: str,
    values: Path | Mapping[str, Any],
    *,
    release: str | None = None,
    namespace: str = NAMESPACE,
    options: tuple[str, ...] = (),
) -> list[Manifest]:
    """Return the objects that a chart makes; a failure of helm is in the assertion."""
    done = template(chart, values, release=release, namespace=namespace, options=options)
    return objects_in(succeeded(done))


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command printed; its failure is in the assertion."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects_in(text: str) -> list[Manifest]:
    """Return the objects of a YAML stream: a dashboard takes yaml.safe_load twenty times as long."""
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def ci_values(chart: str) -> list[Path]:
    """Return the files of values that show a chart's options, one each."""
    return sorted((ROOT / "k8s" / chart / "ci").glob("*-values.yaml"))
