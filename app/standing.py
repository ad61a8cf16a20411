"""How a run stands after its rounds so far, and each site in it, kept up to date a round at a time."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from app.series import COMPLETED, Record, results

# The newest rounds that are known one by one.
ROUNDS: Final = 20


@dataclass
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

    sites: Mapping[str, SiteStanding] = field(default_factory=dict)
    train_loss: float | None = None
    loss: float | None = None
    base_loss: float | None = None
    best_loss: float | None = None
    best_round: int | None = None
    # Of the newest rounds (``ROUNDS``), by their numbers.
    losses: Mapping[int, float | None] = field(default_factory=dict)
    # Rounds, without round 0, which commits the base model.
    committed: int = 0
    # Seconds since 1970.
    checkpoint_at: float | None = None
    # Seconds that combining the last round's updates took.
    aggregation: float | None = None


class Course:
    """Takes a run's rounds in, one after the other, and says how it stands."""

    def __init__(self) -> None:
        self._sites: dict[str, SiteStanding] = {}
        # A held-out loss a round, from round 0 on; NaN where none was measured.
        self._losses: dict[str, array[float]] = {}
        # The newest evaluation: its round, and the frames of each site that it measured.
        self._newest, self._weights = 0, dict[str, int]()
        self._numbers: deque[int] = deque(maxlen=ROUNDS)
        self._best: int | None = None
        self._committed = 0
        self._checkpoint_at: float | None = None
        self._train_loss: float | None = None
        self._aggregation: float | None = None

    def describe(self, sites: Iterable[str]) -> None:
        """Let these sites be there, though nothing is known of them."""
        for name in sites:
            self._sites.setdefault(name, SiteStanding())

    def add(self, record: Record) -> None:
        """Take a round's record in."""
        number, aggregate = int(record["round"]), record["aggregate"]
        self.describe(record["sites"])
        weights: dict[str, int] = {}
        for name, kind, entry in results(record):
            site = self._sites[name]
            if kind == "train":
                site.train, site.round = entry, number
                if entry["state"] == COMPLETED:
                    site.completed = entry
                continue
            site.evaluate = entry
            if (loss := entry["loss"]) is not None:
                self._put(name, number, loss)
                site.loss = loss
                site.best_loss = loss if site.best_loss is None else min(loss, site.best_loss)
                site.base_loss = loss if number == 0 else site.base_loss
                if entry["frames"]:
                    weights[name] = entry["frames"]
        if weights:
            self._newest, self._weights = number, weights
        self._numbers.append(number)
        self._best = record["best"]
        if record["committed"]:
            self._committed += number > 0
            started = datetime.fromisoformat(record["started_at"]).timestamp()
            # The evaluation comes after the checkpoint.
            spent = (each for phase, each in record["seconds"].items() if phase != "evaluate")
            self._checkpoint_at = started + sum(spent)
        if aggregate["train_loss"] is not None:
            self._train_loss = aggregate["train_loss"]
        if aggregate.get("seconds") is not None:
            self._aggregation = aggregate["seconds"]

    def standing(self) -> Standing:
        """How the run stands now."""
        return Standing(
            sites={name: copy(site) for name, site in self._sites.items()},
            train_loss=self._train_loss,
            loss=self._mean(self._newest),
            base_loss=self._mean(0),
            best_loss=None if self._best is None else self._mean(self._best),
            best_round=self._best,
            losses={each: self._mean(each) for each in self._numbers},
            committed=self._committed,
            checkpoint_at=self._checkpoint_at,
            aggregation=self._aggregation,
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
