"""What the rounds of all runs add up to: the exporter's counters.

They only grow while a process counts: a counter that falls reads as one that began anew, and all it holds as new.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.run_metrics import BUCKETS, DROPS, RESULTS, TIMED
from app.series import COMPLETED, Record, results


@dataclass
class Durations:
    """How often something took up to each of ``BUCKETS`` and no less (the last: longer), and the sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.seconds += seconds

    def merge(self, other: Durations) -> None:
        """Count what ``other`` has."""
        self.counts = [one + two for one, two in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds


@dataclass
class Totals:
    """Counts of one run or of several; a site has its entries, all 0, from its description on.

    ``rounds`` is by result and leaves round 0 out, which nobody trains. ``drops`` is by site and reason, ``bytes`` by
    site, kind (train, evaluate) and direction (down, up), ``frames`` by site, ``phases`` by phase.
    """

    rounds: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(RESULTS, 0)))
    drops: dict[str, Counter[str]] = field(default_factory=dict)
    bytes: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    frames: Counter[str] = field(default_factory=Counter)
    phases: dict[str, Durations] = field(
        default_factory=lambda: {name: Durations() for name in TIMED}
    )
    # When a site's own count of its trainer's restarts was told, and that count.
    restarts: dict[str, tuple[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record) -> Totals:
        """The counts of one round; ``KeyError``, ``TypeError`` or ``ValueError`` when it is not a round's record."""
        totals = cls()
        if int(record["round"]) > 0:
            totals.rounds[_result(record)] += 1
        totals.describe(record["sites"])
        for phase in TIMED:
            if (seconds := record["seconds"].get(phase)) is not None:
                totals.phases[phase].add(float(seconds))
        for site, kind, entry in results(record):
            for direction in ("down", "up"):
                totals.bytes[site][kind, direction] += int(entry[f"bytes_{direction}"] or 0)
            if kind != "train":
                continue
            if (reason := dropped(entry)) is not None:
                totals.drops[site][reason] += 1
            else:
                totals.frames[site] += int(entry["frames"] or 0)
            if (restarts := entry.get("trainer_restarts")) is not None:
                totals.restarts[site] = str(record["started_at"]), float(restarts)
        return totals

    def copy(self) -> Totals:
        """The same counts, which stay as they are."""
        totals = Totals()
        totals.merge(self)
        return totals

    def describe(self, sites: Iterable[str]) -> None:
        """Let every count of these sites be there."""
        for site in sites:
            if site not in self.drops:
                self.drops[site] = Counter(dict.fromkeys(DROPS, 0))
                self.bytes[site] = Counter(
                    {(kind, way): 0 for kind in ("train", "evaluate") for way in ("down", "up")}
                )
                self.frames[site] = 0

    def merge(self, other: Totals) -> None:
        """Count what ``other`` has."""
        self.rounds.update(other.rounds)
        self.describe(other.drops)
        for site, reasons in other.drops.items():
            self.drops[site].update(reasons)
            self.bytes[site].update(other.bytes[site])
        self.frames.update(other.frames)
        for phase, durations in other.phases.items():
            self.phases[phase].merge(durations)
        for site, told in other.restarts.items():
            self.restarts[site] = max(told, self.restarts.get(site, told))


def dropped(entry: Mapping[str, Any]) -> str | None:
    """Why a site that was asked to train did not contribute; None when it did."""
    state = str(entry["state"])
    if state == COMPLETED:
        return None
    if state not in DROPS:
        raise ValueError(f"{state!r} is no state that a site ends in")
    diverged = state in ("error", "invalid") and entry.get("cause") == "finite"
    return "diverged" if diverged else state


def _result(record: Record) -> str:
    if not record["committed"]:
        return "failed"
    return "degraded" if record["degraded"] else "committed"
