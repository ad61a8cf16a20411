"""Views of a run's record, as its readers need them: losses over rounds, ends of sites, totals.

Everything is a list with one entry per recorded round, None where nothing was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

type Record = Mapping[str, Any]
"""The run's ``config.json``, or one line of its ``rounds.jsonl``."""
type Run = tuple[Record, Sequence[Record]]
"""A run's ``config.json`` and its rounds."""
type Series = list[float | None]

# Of rounds.State, which cannot be imported without Flower: the command line starts without it.
COMPLETED, LATE = "completed", "late"
# What a run that ended before its last round says in config.json, when that was by its settings.
EARLY_STOPPING = "early stopping"


def sites(config: Record) -> list[str]:
    """The names of the sites that described themselves, sorted."""
    return sorted(config["sites"] or {})


def losses(config: Record, rounds: Sequence[Record]) -> dict[str, Series]:
    """Each site's held-out loss."""
    return {site: [_loss(record, site) for record in rounds] for site in sites(config)}


def mean_losses(config: Record, rounds: Sequence[Record]) -> Series:
    """The mean held-out loss; None where a site is missing, which says nothing against other rounds."""
    names = sites(config)
    return [
        record["aggregate"]["loss"]
        if all(_loss(record, site) is not None for site in names)
        else None
        for record in rounds
    ]


def ends(rounds: Sequence[Record]) -> list[Counter[str]]:
    """How many of the sites asked to train ended in which state."""
    return [
        Counter(str(result["state"]) for _, kind, result in results(record) if kind == "train")
        for record in rounds
    ]


def results(record: Record) -> Iterator[tuple[str, str, Record]]:
    """Site, "train" or "evaluate", and what came of it, for all that was asked in a round."""
    for site, entry in record["sites"].items():
        for kind in ("train", "evaluate"):
            if entry[kind] is not None:
                yield site, kind, entry[kind]


def phases(rounds: Sequence[Record]) -> list[str]:
    """The phases that took time, in the order in which rounds go through them."""
    found = {phase for record in rounds for phase in record["seconds"]}
    order = ("select", "dispatch", "collect", "commit", "degrade", "fail", "evaluate")
    return [*(phase for phase in order if phase in found), *sorted(found - set(order))]


def committed(rounds: Sequence[Record]) -> int:
    """Rounds that trained and were committed: round 0 is the base model."""
    return sum(bool(record["committed"]) for record in rounds if record["round"] > 0)


def best(config: Record, rounds: Sequence[Record]) -> Record | None:
    """The committed round with the lowest mean held-out loss, the first of equals."""
    measured = [
        (loss, record)
        for record, loss in zip(rounds, mean_losses(config, rounds), strict=True)
        if loss is not None and record["checkpoint"]
    ]
    return min(measured, key=lambda entry: entry[0], default=(None, None))[1]


def change(series: Series) -> float | None:
    """The last measured value against the first round's, as a share: -0.5 is half of it."""
    later = [value for value in series[1:] if value is not None]
    return later[-1] / series[0] - 1 if series and series[0] and later else None


def _loss(record: Record, site: str) -> float | None:
    result = (record["sites"].get(site) or {}).get("evaluate") or {}
    loss: float | None = result.get("loss")
    return loss
