"""What in a run's record an operator should look at, each as one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from app.series import COMPLETED, LATE, Record, Series, ends, losses, mean_losses, results

# The loss is a mean squared error, and evaluation gives the same weights the same number: half as
# much again is an error larger by a good fifth, and not chance.
SPIKE_FACTOR = 1.5
# Of the replies a round waits for: below it, most of what it was meant to learn from is missing.
PARTICIPATION = 0.5
# AdamW's steps have about the learning rate's size whatever the gradient's, so sites that take the
# same steps send updates of about the same norm.
NORM_FACTOR = 3.0
# Of two norms that differ, nothing says which is the odd one.
_NORM_SITES = 3
# What a site that completed has measured. (proximal_loss is null wherever mu is 0.)
_METRICS = {
    "train": ("loss", "last_loss", "grad_norm", "update_norm", "frames"),
    "evaluate": ("loss", "rmse_deg", "frames"),
}


class Kind(StrEnum):
    """What is odd."""

    FAILED = "failed round"
    DROPPED = "site dropped"
    PARTICIPATION = "low participation"
    SPIKE = "loss spike"
    MISSING = "metric missing"
    NORM = "norm outlier"


@dataclass(frozen=True)
class Anomaly:
    """One finding; ``site`` is None where it is the whole round's."""

    round: int
    site: str | None
    kind: Kind
    sentence: str


def find(config: Record, rounds: Sequence[Record]) -> list[Anomaly]:
    """The anomalies of a run in the order of its rounds; ``KeyError`` where a record is damaged."""
    spikes = [*_spikes(rounds, None, mean_losses(config, rounds))]
    for site, series in losses(config, rounds).items():
        spikes += _spikes(rounds, site, series)
    found = [anomaly for record in rounds for anomaly in _round(config["config"], record)]
    # Stable: within a round, what happened comes before what was measured.
    return sorted([*found, *spikes], key=lambda anomaly: anomaly.round)


def _round(settings: Mapping[str, Any], record: Record) -> Iterator[Anomaly]:
    number = record["round"]
    # Sites asked beyond the number a round closes with end late by design.
    enough = settings.get("sites-per-round")
    spare = {LATE} if enough and settings.get("over-sampling", 1) > 1 else set()
    if not record["committed"]:
        reason = record["reason"] or "it was not committed"
        yield Anomaly(number, None, Kind.FAILED, f"round {number}: {reason}")
    for site, kind, result in results(record):
        where = f"round {number} {kind}: {site}"
        if result["state"] not in {COMPLETED, *spare}:
            sentence = f"{where} {result['state']}, {result['reason']}"
            yield Anomaly(number, site, Kind.DROPPED, sentence)
        missing = [name for name in _METRICS[kind] if result.get(name) is None]
        if missing and result["state"] == COMPLETED:
            sentence = f"{where} completed without {', '.join(missing)}"
            yield Anomaly(number, site, Kind.MISSING, sentence)
    for uri, result in record["server"].items():
        if result["loss"] is None:
            sentence = f"round {number}: {uri} was not measured, {result['reason']}"
            yield Anomaly(number, None, Kind.MISSING, sentence)
    (ended,) = ends([record])
    awaited = min(enough or ended.total(), ended.total())
    if ended[COMPLETED] < PARTICIPATION * awaited:
        sentence = f"round {number}: {ended[COMPLETED]} of the {awaited} sites it waits for trained"
        yield Anomaly(number, None, Kind.PARTICIPATION, sentence)
    yield from _norms(record)


def _norms(record: Record) -> Iterator[Anomaly]:
    norms = {
        site: result["update_norm"]
        for site, kind, result in results(record)
        if kind == "train" and result.get("update_norm") is not None
    }
    if len(norms) < _NORM_SITES:
        return
    middle = median(norms.values())
    for site, norm in norms.items():
        if norm > NORM_FACTOR * middle:
            sentence = (
                f"round {record['round']} train: {site} sent an update of norm {norm:.3g}, "
                f"over {NORM_FACTOR:g} times the median {middle:.3g}"
            )
            yield Anomaly(record["round"], site, Kind.NORM, sentence)


def _spikes(rounds: Sequence[Record], site: str | None, series: Series) -> Iterator[Anomaly]:
    lowest = math.inf
    for record, loss in zip(rounds, series, strict=True):
        if loss is None:
            continue
        if loss > SPIKE_FACTOR * lowest:
            whose = f"{site}'s" if site else "the mean"
            sentence = (
                f"round {record['round']} evaluate: {whose} held-out loss is {loss:.3f}, "
                f"over {SPIKE_FACTOR:g} times its best, {lowest:.3f}"
            )
            yield Anomaly(record["round"], site, Kind.SPIKE, sentence)
        lowest = min(lowest, loss)
