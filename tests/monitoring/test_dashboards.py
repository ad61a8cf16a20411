"""The Grafana dashboards as files: Grafana's schema, what every panel has, and what Prometheus makes of its queries.

What the queries find after a real run is in end-to-end/test_watching.
"""

import copy
import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from docker.grafana import build
from tests.monitoring.declared import history, labels
from tests.monitoring.grafana_schema import problems
from tests.monitoring.processes import running, wait_ready
from tests.monitoring.queries import DASHBOARDS, filled, panels_of, queries
from tests.monitoring.tools import prometheus_tools
from tests.tools import ROOT

_NAMES = ["federation", "round", "runbook", "security", "site"]
# Prometheus' own, and what it adds to what it scrapes; a site's target also says which site it is.
_OTHERS = {"up": {"site"}, "ALERTS": {"alertstate", "severity"}, "ALERTS_FOR_STATE": set[str]()}
_TARGET = {"job", "instance"}


def dashboard(name: str) -> dict[str, Any]:
    """Return a dashboard's file."""
    read: dict[str, Any] = json.loads((DASHBOARDS / f"{name}.json").read_text())
    return read


def test_the_files_are_what_is_built() -> None:
    written = {path.name: path.read_text() for path in DASHBOARDS.glob("*.json")}
    assert written == build.built(), "run python -m docker.grafana.build"
    assert sorted(written) == [f"{name}.json" for name in _NAMES]


@pytest.mark.parametrize("name", _NAMES)
def test_a_dashboard_is_of_grafanas_schema(name: str) -> None:
    assert problems(dashboard(name)) == []


@pytest.mark.parametrize(
    ("where", "key", "value", "problem"),
    [
        ([], "refersh", "5s", "Dashboard has no 'refersh'"),
        ([], "graphTooltip", 7, "7 is no"),
        ([], "tags", "vlafleet", "'vlafleet' is no list"),
        (["panels", 0], "type", "stats", "there is no panel of type 'stats'"),
        (["panels", 0], "descripton", "", "Panel has no 'descripton'"),
        (["panels", 0, "gridPos"], "w", "4", "'4' is no <class 'int'>"),
        (["panels", 0, "gridPos"], "w", True, "True is no <class 'int'>"),
        (["panels", 0, "options"], "colourMode", "value", "Options has no 'colourMode'"),
        (["panels", 0, "options"], "colorMode", "valu", "'valu' is no"),
        (["panels", 0, "targets", 0], "legend", "", "Dataquery has no 'legend'"),
        (["panels", 0, "targets", 0], "format", "tabel", "'tabel' is no"),
        (["panels", 0, "fieldConfig", "defaults"], "units", "s", "FieldConfig has no 'units'"),
        (["panels", 0, "fieldConfig", "defaults"], "custom", {"x": 1}, "field config has no 'x'"),
        (["panels", 1, "fieldConfig", "overrides", 0, "properties", 0], "id", "unti", "no 'unti'"),
        (["panels", 1, "links", 0], "type", "lnik", "'lnik' is no"),
    ],
)  # fmt: skip
def test_what_the_schema_does_not_know_is_found(
    where: list[Any], key: str, value: object, problem: str
) -> None:
    broken = copy.deepcopy(dashboard("federation"))
    at: Any = broken
    for step in where:
        at = at[step]
    at[key] = value
    (found,) = problems(broken)
    assert problem in found


def test_a_cell_and_a_mapping_of_no_known_type_are_found() -> None:
    broken = dashboard("federation")
    (table,) = (panel for panel in broken["panels"] if panel["id"] == 7)
    properties = {
        each["id"]: each["value"]
        for override in table["fieldConfig"]["overrides"]
        for each in override["properties"]
    }
    properties["custom.cellOptions"]["type"] = "colour-text"
    properties["mappings"][0]["type"] = "vlaue"
    assert len(problems(broken)) == 2


@pytest.mark.parametrize("name", _NAMES)
def test_panels_are_distinct_explained_and_ask_the_provisioned_prometheus(name: str) -> None:
    sources = yaml.safe_load(
        (ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text()
    )
    uid = sources["datasources"][0]["uid"]
    panels = panels_of(dashboard(name))
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] in ("row", "text"):
            assert panel["title"]
            continue
        where = panel["title"]
        assert where
        assert panel["description"].endswith("."), where
        assert panel["datasource"]["uid"] == uid, where
        assert all(target["datasource"]["uid"] == uid for target in panel["targets"]), where
        defaults = panel["fieldConfig"]["defaults"]
        assert defaults["unit"], where
        # Several curves, or bars, are told apart by their names.
        if len(panel["targets"]) > 1 and panel["type"] != "table":
            assert all(target.get("legendFormat") for target in panel["targets"]), where
        if panel["type"] in ("timeseries", "state-timeline", "bargauge"):
            assert all(target.get("legendFormat") for target in panel["targets"]), where


@pytest.mark.parametrize("name", _NAMES)
def test_panels_share_the_24_columns_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels_of(dashboard(name)):
        at = panel["gridPos"]
        cells = set(
            itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
        )
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_federation_is_one_screen() -> None:
    # 24 units of height are the 1,000 pixels that a browser leaves of a screen of 1,080.
    panels = dashboard("federation")["panels"]
    assert max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) <= 24


def test_links_lead_to_dashboards_and_panels_that_exist() -> None:
    boards = {read["uid"]: read for read in map(dashboard, _NAMES)}
    sections = {panel["id"]: panel["title"] for panel in dashboard("runbook")["panels"]}
    found = 0
    for board in boards.values():
        (to_others,) = board["links"]
        assert to_others["type"] == "dashboards"
        assert all(set(to_others["tags"]) <= set(each["tags"]) for each in boards.values())
        for url, title in _links(board):
            found += 1
            uid, _, query = url.removeprefix("/d/").partition("?")
            assert uid in boards, url
            if section := re.fullmatch("Runbook: (.+)", title):
                assert sections[int(query.removeprefix("viewPanel=panel-"))] == section[1]
    assert found > 50


def test_the_runbook_has_every_section_and_leads_from_one_to_another() -> None:
    rules = yaml.safe_load((ROOT / "docker/prometheus/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    sections = {panel["title"]: panel for panel in dashboard("runbook")["panels"]}
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert list(sections) == ["Runbook", *headings]
    assert alerts <= sections.keys()
    for name, panel in sections.items():
        text = panel["options"]["content"]
        assert "# " not in text.splitlines()[0], name
        assert ".md)" not in re.sub(r"\(docs/[\w-]+\.md\)", "", text), name
        for title, id_ in re.findall(
            r"\[(\w+)\]\(/d/vlafleet-runbook\?viewPanel=panel-(\d+)\)", text
        ):
            assert sections[title]["id"] == int(id_), (name, title)


def test_the_home_dashboard_is_one_of_the_files() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    grafana = compose["services"]["grafana"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    provider = yaml.safe_load(
        (ROOT / "docker/grafana/provisioning/dashboards/files.yml").read_text()
    )["providers"][0]
    assert Path(home) == Path(provider["options"]["path"]) / "federation.json"
    assert {"source": "./docker/grafana/dashboards", "target": str(Path(home).parent)}.items() <= {
        key: value for mount in grafana["volumes"] for key, value in mount.items()
        if str(mount["target"]).endswith("dashboards")
    }.items()  # fmt: skip


def test_queries_ask_for_declared_metrics_and_their_labels() -> None:
    for query in queries():
        # What a function or an aggregation groups by is no metric.
        expr = re.sub(r"\b(by|on|ignoring|group_left) \([^)]*\)", "", query.expr)
        expr = re.sub(r'"[^"]*"', '""', expr)
        asked = re.findall(r"\b((?:vlafleet_|process_)\w+|up|ALERTS\w*)\b(?:\{([^}]*)\})?", expr)
        assert asked, query
        for name, selected in asked:
            own = _OTHERS.get(name, labels().get(name))
            assert own is not None, f"{query}: nobody declares {name}"
            wanted = {part.partition("=")[0].strip("!~ ") for part in selected.split(",") if part}
            assert wanted <= own | _TARGET | ({"site"} if query.needs_site_exporter else set()), (
                query
            )


def test_queries_with_a_variable_that_nobody_fills_are_refused() -> None:
    with pytest.raises(ValueError, match="has \\$instance, which has no value here"):
        filled('up{instance="$instance"}')


def test_every_query_has_an_answer_with_the_labels_that_are_shown(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """On a Prometheus with a history of every declared metric."""
    tools = prometheus_tools()
    with (tmp_path / "history").open("w") as file:
        file.writelines(history(time.time(), seconds=6 * 60, step=20))
    subprocess.run(
        [tools / "promtool", "tsdb", "create-blocks-from", "openmetrics", "history", "data"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (tmp_path / "prometheus.yml").write_text("global: {}")
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(tools / "prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with running(tmp_path / "log", command):
        wait_ready(f"http://{address}/-/ready", tmp_path / "log")
        panels = itertools.chain(*(panels_of(dashboard(name)) for name in _NAMES))
        wrong = [fault for panel in panels for fault in _faults(panel, address)]
    assert wrong == []


def _faults(panel: dict[str, Any], address: str) -> Iterator[str]:
    """Yield what a panel asks for and does not get."""
    where, found = panel["title"], set[str]()
    for target in panel.get("targets", []):
        expr = filled(target["expr"])
        said = httpx.post(f"http://{address}/api/v1/query", data={"query": expr}).json()
        result = said.get("data", {}).get("result", [])
        if not result:
            yield f"{where}: {expr}: {said.get('error', 'no answer')}"
        has = {label for series in result for label in series["metric"]}
        if missing := set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))) - has:
            yield f"{where}: {expr}: no label {missing}"
        found |= has
    for step in panel.get("transformations", []):
        if step["id"] == "filterFieldsByName":
            kept = step["options"]["include"]["pattern"].strip("/^()$").split("|")
            columns = {column for column in kept if not column.startswith("Value")}
            if columns - found:
                yield f"{where}: no column {columns - found}"


def _links(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in panels_of(board):
        for link in panel.get("links", []):
            yield link["url"], link["title"]
        for override in panel.get("fieldConfig", {}).get("overrides", []):
            for each in override["properties"]:
                if each["id"] == "links":
                    yield from ((link["url"], link["title"]) for link in each["value"])
