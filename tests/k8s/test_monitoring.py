"""What the superlink chart tells Prometheus and Grafana is what the demo's are told, file by file."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.charts import ROOT, Manifest
from tests.k8s.objects import of_kind
from tests.k8s.renders import rendered

DOCKER = ROOT / "docker"


def monitoring() -> list[Manifest]:
    """Return the objects of a release with everything for Prometheus and Grafana."""
    return rendered("superlink", ROOT / "k8s/superlink/ci/monitoring-values.yaml").manifests


def test_the_alerts_are_those_of_the_demo() -> None:
    (rule,) = of_kind(monitoring(), "PrometheusRule")
    # Templates in annotations ({{ $labels.site }}) are Prometheus' and come through Helm as they are.
    assert rule["spec"] == yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())


def test_the_dashboards_are_those_of_the_demo() -> None:
    found: dict[str, Any] = {}
    for config in of_kind(monitoring(), "ConfigMap"):
        if "grafana_dashboard" in config["metadata"]["labels"]:
            found.update(config["data"])
    files = sorted((DOCKER / "grafana/dashboards").glob("*.json"))
    assert files
    # Grafana's sidecar puts all that it finds into one directory: the files' names say whose they are.
    assert {name: json.loads(text) for name, text in found.items()} == {
        f"vlafleet-{path.name}": json.loads(path.read_text()) for path in files
    }
    # A ConfigMap holds one MiB.
    assert max(len(text) for text in found.values()) < 1 << 20


def test_jobs_are_called_as_alerts_and_dashboards_call_them() -> None:
    manifests = monitoring()
    services = {one["metadata"]["name"]: one for one in of_kind(manifests, "Service")}
    called = set()
    for monitor in of_kind(manifests, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        (service,) = (
            one for one in services.values() if wanted.items() <= one["metadata"]["labels"].items()
        )
        called.add(service["metadata"]["labels"][monitor["spec"]["jobLabel"]])
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["scheme"] == "https"
            assert set(endpoint["tlsConfig"]) >= {"ca", "cert", "keySecret", "serverName"}
            assert not endpoint["tlsConfig"].get("insecureSkipVerify")
    assert called | site_labels("job") == scraped_by_the_demo()
    texts = [path.read_text() for path in _monitoring_files()]
    named = {name for text in texts for name in re.findall(r'job=\\?"([a-z-]+)\\?"', text)}
    assert "site" in named
    assert named <= scraped_by_the_demo()


def test_a_sites_metrics_are_labelled_as_alerts_and_dashboards_ask_for_them() -> None:
    assert (site_labels("job"), site_labels("site")) == ({"site"}, {"lab-7"})


def site_labels(name: str) -> set[str]:
    """Return the values that a site's PodMonitor gives to a label of its series."""
    manifests = rendered("site", ROOT / "k8s/site/ci/metrics-values.yaml").manifests
    (monitor,) = of_kind(manifests, "PodMonitor")
    return {
        relabeling["replacement"]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
        if relabeling["targetLabel"] == name
    }


def scraped_by_the_demo() -> set[str]:
    """Return the jobs of the demo's Prometheus but for the monitoring's own."""
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    return {job["job_name"] for job in config["scrape_configs"]} - {"prometheus", "alertmanager"}


def _monitoring_files() -> list[Path]:
    return [DOCKER / "prometheus/alerts.yml", *(DOCKER / "grafana/dashboards").glob("*.json")]
