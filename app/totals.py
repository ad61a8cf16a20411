"""What the rounds of all runs add up to: the exporter's counters.

They only grow while a process counts: a counter that falls reads as one that began anew, and all it holds as new.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
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

    def add(self, record: Record) -> None:
        """Count a round: all of it or, with ``KeyError``, ``TypeError`` or ``ValueError``, nothing."""
        self.describe(record["sites"])
        rounds = [_result(record)] if int(record["round"]) > 0 else []
        spent = {phase: float(record["seconds"].get(phase, math.nan)) for phase in TIMED}
        counts: list[tuple[Counter[Any], Any, int]] = []
        restarts: dict[str, tuple[str, float]] = {}
        for site, kind, entry in results(record):
            counts += [
                (self.bytes[site], (kind, way), int(entry[f"bytes_{way}"] or 0))
                for way in ("down", "up")
            ]
            if kind == "train":
                if (reason := dropped(entry)) is not None:
                    counts.append((self.drops[site], reason, 1))
                else:
                    counts.append((self.frames, site, int(entry["frames"] or 0)))
                if (told := entry.get("trainer_restarts")) is not None:
                    restarts[site] = str(record["started_at"]), float(told)
        # From here on nothing fails.
        self.rounds.update(rounds)
        for counter, key, number in counts:
            counter[key] += number
        for phase, seconds in spent.items():
            if not math.isnan(seconds):
                self.phases[phase].add(seconds)
        self._tell(restarts)

    def copy(self) -> Totals:
        """The same counts, which stay as they are."""
        return deepcopy(self)

    def describe(self, sites: Iterable[str]) -> None:
        """Let every count of these sites be there."""
        for site in sites:
            if site not in self.drops:
                self.drops[site] = Counter(dict.fromkeys(DROPS, 0))
                self.bytes[site] = Counter(
                    {(kind, way): 0 for kind in ("train", "evaluate") for way in ("down", "up")}
                )
                self.frames[site] = 0

    def _tell(self, restarts: Mapping[str, tuple[str, float]]) -> None:
        """Keep what each site told last, in whatever order the runs are read."""
        for site, told in restarts.items():
            self.restarts[site] = max(told, self.restarts.get(site, told))


def dropped(entry: Mapping[str, Any]) -> str | None:
    """Why a site that was asked to train did not contribute; None when it did."""
    state = str(entry["state"])
    if state == COMPLETED:
        return None
    if state not in DROPS:
        raise ValueError(f"{state!r} is no state that a site ends in")
    # app.cause.FINITE, which needs numpy.
    diverged = state in ("error", "invalid") and entry.get("cause") == "finite"
    return "diverged" if diverged else state


def _result(record: Record) -> str:
    if not record["committed"]:
        return "failed"
    return "degraded" if record["degraded"] else "committed"
