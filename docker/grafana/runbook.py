"""The runbook dashboard: docs/runbook.md's section of every alert, for a Grafana that reaches no page outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import yaml
from grafana_foundation_sdk.builders import dashboard

from docker.grafana.panels import board, link, note

_ROOT = Path(__file__).parents[2]
_RULES: Final = _ROOT / "docker" / "prometheus" / "alerts.yml"
_RUNBOOK: Final = _ROOT / "docs" / "runbook.md"
_URL: Final = "/d/vlafleet-runbook"


def alerts() -> list[str]:
    """Return the names of the alerts, in the order of their rules."""
    groups = yaml.safe_load(_RULES.read_text())["groups"]
    names = (rule.get("alert") for group in groups for rule in group["rules"])
    # A page and a ticket of one name are two degrees of the same alert.
    return list(dict.fromkeys(name for name in names if name))


def runbook(alert: str = "") -> list[dashboard.DashboardLink]:
    """Return the link from a panel to the runbook, or to the section of the alert that watches the same."""
    if not alert:
        return [link("Runbook", _URL)]
    panel = alerts().index(alert) + 1
    return [link(f"Runbook: {alert}", f"{_URL}?viewPanel=panel-{panel}")]


def build() -> dashboard.Dashboard:
    """Return the dashboard; ``ValueError`` names an alert that the runbook leaves out."""
    parts = re.split(r"^## +(.+?) *$", _RUNBOOK.read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    made = board("runbook", "Runbook", "What each alert means, where to look, and what to do.")
    for i, alert in enumerate(alerts(), start=1):
        if alert not in sections:
            raise ValueError(f"{_RUNBOOK.name} has no section for {alert}")
        made.with_panel(note(i, alert, sections[alert].strip(), width=12, height=12))
    return made
