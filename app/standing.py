"""How a run stands after its rounds so far, and each site in it, kept up to date a round at a time."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import MappingProxyType
from typing import Final

from app.series import COMPLETED, Record

# The newest rounds that are known one by one.
ROUNDS: Final = 20


@dataclass(frozen=True)
class SiteStanding:
    """What the rounds say of a site; None what they do not.

    ``train`` and ``evaluate`` are the entries of when it was last asked, whatever came of it, and ``round`` is that
    training's; ``completed`` is its last completed training's. Losses are held-out ones.
    """

    train: Record | None = None
    round: int | None = None
    completed: Record | None = None
    evaluate: Record | None = None
    loss: float | None = None
    base_loss: float | None = None
    best_loss: float | None = None


@dataclass(frozen=True)
class Standing:
    """What a run's rounds say; None what they do not.

    Held-out losses are means by frames over the sites that the newest evaluation measured, so that the three compare;
    one of a round that lacks such a site is None (as ``app.record.history``).
    """

    sites: Mapping[str, SiteStanding] = field(default_factory=lambda: MappingProxyType({}))
    train_loss: float | None = None
    loss: float | None = None
    base_loss: float | None = None
    best_loss: float | None = None
    best_round: int | None = None
    # Of the newest rounds (``ROUNDS``), by their numbers.
    losses: Mapping[int, float | None] = field(default_factory=lambda: MappingProxyType({}))
    # Rounds, without round 0, which commits the base model.
    committed: int = 0
    # Seconds since 1970.
    checkpoint_at: float | None = None
    # Seconds that combining the last round's updates took.
    aggregation: float | None = None


class Course:
    """Takes a run's rounds in, one after the other, and says how it stands."""

    def __init__(self) -> None:
        self.standing = Standing()
        self._sites: dict[str, SiteStanding] = {}
        # A held-out loss a round, from round 0 on; NaN where none was measured.
        self._losses: dict[str, array[float]] = {}
        self._weights: dict[str, int] = {}
        self._newest = 0
        self._numbers: deque[int] = deque(maxlen=ROUNDS)

    def describe(self, sites: Iterable[str]) -> None:
        """Let these sites be there, though nothing is known of them."""
        for name in sites:
            self._sites.setdefault(name, SiteStanding())
        self.standing = replace(self.standing, sites=MappingProxyType(dict(self._sites)))

    def add(self, record: Record) -> None:
        """Take a round's record in, one that ``Totals.of`` could count."""
        number, aggregate = int(record["round"]), record["aggregate"]
        weights: dict[str, int] = {}
        for name, entries in record["sites"].items():
            site = self._sites.get(name, SiteStanding())
            if (train := entries["train"]) is not None:
                site = replace(site, train=train, round=number)
                if train["state"] == COMPLETED:
                    site = replace(site, completed=train)
            if (evaluate := entries["evaluate"]) is not None:
                site = replace(site, evaluate=evaluate)
                if (loss := evaluate["loss"]) is not None:
                    self._put(name, number, loss)
                    lowest = loss if site.best_loss is None else min(loss, site.best_loss)
                    base = loss if number == 0 else site.base_loss
                    site = replace(site, loss=loss, best_loss=lowest, base_loss=base)
                    if evaluate["frames"]:
                        weights[name] = evaluate["frames"]
            self._sites[name] = site
        if weights:
            self._weights, self._newest = weights, number
        self._numbers.append(number)
        before = self.standing
        committed, committed_at = before.committed, before.checkpoint_at
        if record["committed"]:
            committed += number > 0
            started = datetime.fromisoformat(record["started_at"]).timestamp()
            # The evaluation comes after the checkpoint.
            spent = (each for phase, each in record["seconds"].items() if phase != "evaluate")
            committed_at = started + sum(spent)
        best = record["best"]
        self.standing = Standing(
            sites=MappingProxyType(dict(self._sites)),
            train_loss=_newer(aggregate["train_loss"], before.train_loss),
            loss=self._mean(self._newest),
            base_loss=self._mean(0),
            best_loss=None if best is None else self._mean(best),
            best_round=best,
            losses=MappingProxyType({each: self._mean(each) for each in self._numbers}),
            committed=committed,
            checkpoint_at=committed_at,
            aggregation=_newer(aggregate.get("seconds"), before.aggregation),
        )

    def _put(self, name: str, number: int, loss: float) -> None:
        losses = self._losses.setdefault(name, array("d"))
        losses.extend([math.nan] * (number + 1 - len(losses)))
        losses[number] = loss

    def _mean(self, number: int) -> float | None:
        """The mean held-out loss of a round over the sites that the newest evaluation measured."""
        total = 0.0
        for name, frames in self._weights.items():
            losses = self._losses[name]
            if number >= len(losses) or math.isnan(losses[number]):
                return None
            total += losses[number] * frames
        return total / sum(self._weights.values()) if self._weights else None


def _newer(value: float | None, before: float | None) -> float | None:
    return before if value is None else value
