"""Every ``ci/*-values.yaml`` as a render, made once in a session: what the checks of the charts go through."""

import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.charts import CHARTS, Manifest, ci_values, template
from tests.k8s.task_pods import task_pods


@dataclass(frozen=True)
class Rendered:
    """The values that were given and the objects that came of them, tasks' pods included."""

    values: dict[str, Any]
    manifests: list[Manifest]
    # As Helm wrote them.
    text: str = ""


@functools.cache
def rendered(chart: str, path: Path) -> Rendered:
    """Return what a chart makes of a file of values; nobody may change it."""
    values = yaml.safe_load(path.read_text()) or {}
    text = succeeded(template(chart, path))
    manifests = objects_in(text)
    return Rendered(values, [*manifests, *task_pods(manifests)], text)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Return what a command printed; its failure is in the assertion."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects_in(text: str) -> list[Manifest]:
    """Return the objects of a YAML stream: a dashboard takes yaml.safe_load twenty times as long."""
    return [found for found in yaml.load_all(text, yaml.CSafeLoader) if found]


def _name(path: Path) -> str:
    return path.name.removesuffix("-values.yaml")


# One test each: (chart, file of values).
EVERY_RENDER = pytest.mark.parametrize(
    ("chart", "path"),
    [
        pytest.param(chart, path, id=f"{chart}-{_name(path)}")
        for chart in CHARTS
        for path in ci_values(chart)
    ],
)


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside of values: the names that an operator gave."""
    match value:
        case str():
            yield value
        case dict():
            for inner in value.values():
                yield from strings(inner)
        case list():
            for inner in value:
                yield from strings(inner)
