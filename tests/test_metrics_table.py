"""The table of metrics is what the code declares, all of it, and its bound of series holds."""

import ast
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry

from app import run_metrics
from app.runs_view import Runs
from certs.audit import Audit
from certs.metric import Metric
from docs import metrics_table
from superlink.metrics import FleetCollector
from superlink.server import rules
from tests.records import record, run

ROOT = Path(__file__).parents[1]
PACKAGES = ("app", "certs", "superlink", "supernode")
SITES = [f"site-{number}" for number in range(100)]


def listed() -> list[Metric]:
    every = [metric for section in metrics_table.SECTIONS for metric in section.metrics]
    return [*every, *metrics_table._EVERYWHERE]


def declared() -> list[str]:
    """The name of every metric that a module declares; ``AssertionError`` for one that is made without."""
    names = []
    for path in (each for package in PACKAGES for each in (ROOT / package).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            first = call.args[0]
            text = first.value if isinstance(first, ast.Constant) else None
            if isinstance(text, str) and text.startswith("vlafleet_"):
                maker = call.func.id if isinstance(call.func, ast.Name) else None
                assert maker == "Metric", f"{path}: {text} is not declared with Metric"
                names.append(text)
    return names


def test_the_page_is_current() -> None:
    assert metrics_table.PATH.read_text() == metrics_table.text(), "run 'make docs'"


def test_the_page_has_every_metric_once() -> None:
    assert Counter(metric.name for metric in listed()) == Counter(declared())


def test_every_label_is_counted() -> None:
    known = {metric.name: metric for metric in listed()}
    for name, values in metrics_table._VALUES_OF.items():
        assert set(values) <= set(known[name].labels), name


def test_the_exporters_bound(tmp_path: Path) -> None:
    rounds = [record(number, dict.fromkeys(SITES, 0.5)) for number in range(3)]
    run(tmp_path, rounds, ended={"at": "2026-01-01T01:00:00+00:00", "reason": "completed"})
    runs = Runs(tmp_path)
    runs.refresh()
    told = sum(len(family.samples) for family in run_metrics.families(runs.view))
    bound: Counter[str] = Counter()
    for metric in run_metrics.METRICS:
        bound.update(metrics_table.series(metric))
    assert 20 * len(SITES) < told <= bound[""] + len(SITES) * bound[metrics_table.SITE]
    assert set(bound) == {"", metrics_table.SITE}


def test_the_superlinks_bound(tmp_path: Path) -> None:
    nodes = [
        SimpleNamespace(name=name, status="online", online_until=2e9, heartbeat_interval=30.0)
        for name in SITES
    ]
    state = SimpleNamespace(get_node_info=lambda: nodes, get_run_info=list)
    factory: Any = SimpleNamespace(state=lambda: state)
    registry = CollectorRegistry()
    registry.register(FleetCollector(factory))
    told = sum(len(family.samples) for family in registry.collect())
    bound = metrics_table.SECTIONS[1].series()
    assert told == 2 * len(SITES) + 6 <= bound[""] + len(SITES) * bound[metrics_table.SITE]
    # Of its paths the guard counts each, and all others as one.
    paths = rules(None, factory, None, Audit(tmp_path / "audit.jsonl"))  # type: ignore[arg-type]
    assert len(paths) + 1 <= metrics_table.PATHS


def test_what_prometheus_client_adds() -> None:
    own = [
        sample
        for family in REGISTRY.collect()
        if family.name.startswith(("process_", "python_"))
        for sample in family.samples
    ]
    assert 0 < len(own) <= metrics_table.OWN_SERIES
