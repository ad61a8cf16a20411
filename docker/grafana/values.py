"""What is asked of Prometheus, and what the answers are shown as: forms of queries, words and colours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from app import run_metrics

# A colour from each value on; the first has none.
type Steps = Sequence[tuple[float | None, str]]
# What a value is shown as, and in which colour.
type Texts = Mapping[str, tuple[str, str]]


def _colored(names: Sequence[str], *colors: str) -> Mapping[str, str]:
    return dict(zip(names, colors, strict=True))


GREEN, ORANGE, RED, BLUE, PURPLE, YELLOW, GREY = (
    "green", "orange", "red", "blue", "purple", "yellow", "text",
)  # fmt: skip
ONLINE: Final[Texts] = {"0": ("offline", RED), "1": ("online", GREEN)}
UP: Final[Texts] = {"0": ("down", RED), "1": ("up", GREEN)}
# How a site's training goes, or ended; and what a round is at.
STATES: Final = _colored(run_metrics.STATES, BLUE, GREEN, YELLOW, ORANGE, RED, RED, PURPLE)
PHASES: Final = _colored(
    run_metrics.PHASES, GREY, PURPLE, BLUE, BLUE, YELLOW, GREEN, ORANGE, RED, PURPLE, GREEN
)
# Alerts fire at a quarter of a certificate's life, and holders renew at a third (certs.renewal).
LIFE_LEFT: Final[Steps] = [(None, RED), (0.25, ORANGE), (0.33, GREEN)]
# The other alerts' limits.
DISK_FREE: Final[Steps] = [(None, RED), (0.1, ORANGE), (0.2, GREEN)]
DATA_WAIT: Final[Steps] = [(None, GREEN), (0.15, ORANGE), (0.3, RED)]


@dataclass(frozen=True)
class Ask:
    """A query, and what its series are called; ``{{site}}`` stands for a label."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Column:
    """A table's column: the value of a query, or with ``label`` that label of its series."""

    expr: str
    title: str
    label: str = ""
    unit: str = "none"
    decimals: int | None = None
    steps: Steps = ()
    texts: Texts = field(default_factory=dict)


def high_is_bad(orange: float, red: float) -> Steps:
    """Green, orange from ``orange`` on, red from ``red`` on."""
    return [(None, GREEN), (orange, ORANGE), (red, RED)]


def none(label: str) -> str:
    """What a query ends with that finds nothing while all is well: one sample of 0, whose label says ``none``."""
    return f' or on () label_replace(vector(0), "{label}", "none", "", "")'


def coded(metric: str, label: str, values: Iterable[str], *, where: str = "", by: str = "") -> str:
    """Return the query for which of ``values`` a gauge of 0 and 1 has at 1, as its place among them, from 1 on.

    ``where`` selects more (``site="$site"``), ``by`` is a label that each answer keeps.
    """
    and_where = f",{where}" if where else ""
    told = (f'{i} * {metric}{{{label}="{v}"{and_where}}}' for i, v in enumerate(values, start=1))
    return f"max by ({by}) ({' or '.join(told)})"


def codes(values: Mapping[str, str]) -> Texts:
    """Return what ``coded`` values are shown as; ``values`` have their colours."""
    shown = {str(i): (value, values[value]) for i, value in enumerate(values, start=1)}
    return {"0": ("not yet", GREY), **shown}
