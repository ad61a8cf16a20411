"""Every ``ci/*-values.yaml`` as a render, made once in a session: what the checks of the charts go through."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.charts import CHARTS, Manifest, ci_values, objects_in, succeeded, template
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
