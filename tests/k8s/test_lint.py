"""What Helm itself says of the charts, and whether every option of theirs is shown by a file of values."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.charts import CHARTS, ROOT, ci_values, helm
from tests.k8s.renders import EVERY_RENDER

# Maps that are handed to Kubernetes as they are.
KUBERNETES = ("affinity", "resources", "namespaceSelector", "podSelector")


@EVERY_RENDER
def test_helm_lint_is_content(chart: str, path: Path) -> None:
    done = helm("lint", "--strict", f"k8s/{chart}", "--values", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("chart", CHARTS)
def test_every_value_is_given_by_some_file(chart: str) -> None:
    """A value that no ``ci/*-values.yaml`` gives is one whose templates nothing renders otherwise than by default."""
    schema = json.loads((ROOT / "k8s" / chart / "values.schema.json").read_text())
    given = [
        one for path in ci_values(chart) for one in _paths(yaml.safe_load(path.read_text()) or {})
    ]
    missing = {
        path
        for path in _leaves(schema, schema)
        if not any(f"{one}.".startswith(f"{path}.") for one in given)
    }
    # Helm's own, where a chart is part of another.
    assert sorted(missing - {"global"}) == []


def _paths(values: Any, prefix: str = "") -> list[str]:
    """Return the keys of values as dotted paths, leaves only."""
    if not isinstance(values, dict) or not values:
        return [prefix]
    return [
        path
        for key, value in values.items()
        for path in _paths(value, f"{prefix}.{key}".lstrip("."))
    ]


def _leaves(schema: dict[str, Any], root: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the values that a schema names, as dotted paths; a map that is Kubernetes' (affinity) is one."""
    schema = _resolved(schema, root)
    if "properties" not in schema or prefix.endswith(KUBERNETES):
        return [prefix]
    return [
        path
        for key, inner in schema["properties"].items()
        for path in _leaves(inner, root, f"{prefix}.{key}".lstrip("."))
    ]


@pytest.mark.parametrize("chart", CHARTS)
def test_a_schema_leaves_no_key_unknown(chart: str) -> None:
    """Every map whose keys the schema names refuses all others."""
    schema = json.loads((ROOT / "k8s" / chart / "values.schema.json").read_text())
    named = list(_named(schema))
    assert named
    assert [where for where, one in named if one.get("additionalProperties") is not False] == []


@pytest.mark.parametrize("chart", CHARTS)
def test_a_value_that_is_taken_away_is_missed(chart: str) -> None:
    """A null, Helm's way to drop a default, is answered by the schema, and not by a template that stumbles over it."""
    schema = json.loads((ROOT / "k8s" / chart / "values.schema.json").read_text())
    defaults = yaml.safe_load((ROOT / "k8s" / chart / "values.yaml").read_text())
    missing = list(_not_required(schema, defaults, schema))
    assert missing == []


def _not_required(
    schema: dict[str, Any], defaults: Any, root: dict[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Yield the keys with a default that the schema does not ask for, as dotted paths."""
    schema = _resolved(schema, root)
    if "properties" not in schema or prefix.endswith(KUBERNETES):
        return
    for key in sorted(set(defaults) & set(schema["properties"])):
        path = f"{prefix}.{key}".lstrip(".")
        if key not in schema.get("required", []):
            yield path
        if isinstance(defaults[key], dict):
            yield from _not_required(schema["properties"][key], defaults[key], root, path)


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Return what a reference inside of a schema refers to."""
    while "$ref" in schema:
        place: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            place = place[step]
        schema = place
    return schema


def _named(schema: Any, where: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts of a schema that name keys; conditions add to what is described elsewhere."""
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and not where.endswith("/properties"):
            yield where, schema
        for key, inner in schema.items():
            if key not in ("if", "then", "else", "not", "anyOf", "oneOf", "allOf"):
                yield from _named(inner, f"{where}/{key}")


@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_is_of_the_version_of_its_images(chart: str) -> None:
    about = yaml.safe_load((ROOT / "k8s" / chart / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{about["appVersion"]}"\n' in project
    # As the schemas that the output is held against.
    assert about["kubeVersion"] == ">=1.27.0-0"
