"""The runbook dashboard: docs/runbook.md section by section, for a Grafana that reaches no page outside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard

from docker.grafana.panels import board, link, note

_PAGE: Final = Path(__file__).parents[2] / "docs" / "runbook.md"
_URL: Final = "/d/vlafleet-runbook"


def sections() -> dict[str, str]:
    """Return the page's text by second-level heading, what comes before the first one as ``Runbook``."""
    before, *parts = re.split(r"^## +(.+?) *$", _PAGE.read_text(), flags=re.MULTILINE)
    return {
        "Runbook": before.removeprefix("# Runbook").strip(),
        **dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True)),
    }


def runbook(section: str = "Runbook") -> list[dashboard.DashboardLink]:
    """Return the link from a panel to the section on the alert that watches the same."""
    title = section if section == "Runbook" else f"Runbook: {section}"
    return [link(title, _address(section))]


def build() -> dashboard.Dashboard:
    """Return the dashboard; ``ValueError`` names a link to a section that the page has not."""
    made = board("runbook", "Runbook", "What each alert means, where to look, and what to do.")
    for i, (section, text) in enumerate(sections().items(), start=1):
        made.with_panel(note(i, section, _relinked(text), width=12, height=14))
    return made


def _address(section: str) -> str:
    names = list(sections())
    if section not in names:
        raise ValueError(f"{_PAGE.name} has no section {section!r}")
    return f"{_URL}?viewPanel=panel-{names.index(section) + 1}"


def _relinked(text: str) -> str:
    """Lead links to other sections to their panels; of other pages say the file, Grafana has none of them."""
    anchors = {name.lower().replace(" ", "-"): name for name in sections()}

    def panel(found: re.Match[str]) -> str:
        return f"[{found[1]}]({_address(anchors.get(found[2], found[2]))})"

    text = re.sub(r"\[([^]]+)\]\(#([^)]+)\)", panel, text)
    return re.sub(r"\[([^]]+)\]\(([\w-]+\.md)(?:#[\w-]+)?\)", r"\1 (docs/\2)", text)
