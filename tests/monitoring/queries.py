"""What the dashboards ask Prometheus, with Grafana's variables filled in as Grafana would."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARDS = Path(__file__).parents[2] / "docker" / "grafana" / "dashboards"

_VARIABLES = {
    "__rate_interval": "1m",
    "__interval": "15s",
    "__range": "30m",
    "site": "site-a",
}
_LABEL_VALUES = re.compile(r"label_values\((.+), *\w+\)")


class Query(NamedTuple):
    """A panel's query, or a variable's (``panel`` is then ``$name``)."""

    dashboard: str
    panel: str
    expr: str

    @property
    def needs_gpu(self) -> bool:
        """Whether a federation without GPUs has no answer."""
        return re.search(r"\bvlafleet_\w*gpu", self.expr) is not None

    @property
    def needs_site_exporter(self) -> bool:
        """Whether only a Prometheus that scrapes the site itself has an answer."""
        return 'job="site"' in self.expr


def panels_of(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a dashboard's panels and rows; a collapsed row holds its panels itself."""
    return [panel for outer in dashboard["panels"] for panel in (outer, *outer.get("panels", []))]


def filled(expr: str) -> str:
    """Return a query with its variables filled in; ``ValueError`` names one that has no value here."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in _VARIABLES:
            raise ValueError(f"{expr} has ${found[1]}, which has no value here")
        return _VARIABLES[found[1]]

    return re.sub(r"\$\{?(\w+)\}?", value, expr)


def queries() -> list[Query]:
    """Return every query of every dashboard; ``ValueError`` names a variable that has no value here."""
    return [query for path in sorted(DASHBOARDS.glob("*.json")) for query in _queries_of(path)]


def _queries_of(path: Path) -> Iterator[Query]:
    dashboard = json.loads(path.read_text())
    title = dashboard["title"]
    for variable in dashboard["templating"].get("list", []):
        found = _LABEL_VALUES.fullmatch(variable["query"])
        if found is None:
            raise ValueError(f"{path.name}: ${variable['name']} asks {variable['query']!r}")
        yield Query(title, f"${variable['name']}", found[1])
    for panel in panels_of(dashboard):
        for target in panel.get("targets", []):
            yield Query(title, panel["title"], filled(target["expr"]))
