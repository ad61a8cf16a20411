"""The Grafana dashboards as files; their queries run against a real Prometheus in test_compose_federation."""

import json
from pathlib import Path

import pytest
import yaml

from tests.docker.compose_project import ROOT

GRAFANA = ROOT / "docker" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


def test_the_home_dashboard_is_one_of_the_files() -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    home = compose["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert Path(home).name in {path.name for path in DASHBOARDS}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_are_distinct_named_and_ask_the_provisioned_prometheus(path: Path) -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())
    uid = sources["datasources"][0]["uid"]
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"]
    panels = dashboard["panels"]
    for field in ("id", "title"):
        assert len({panel[field] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"]
        assert panel["datasource"]["uid"] == uid
        assert all(target["datasource"]["uid"] == uid for target in panel["targets"])
        # 24 columns are a Grafana row.
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
