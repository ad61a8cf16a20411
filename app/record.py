"""The record of one round, as ``rounds.jsonl`` keeps it: begun, filled in by its phases, completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from app.aggregation import mean_loss, mean_rmse
from app.rounds import State
from app.schedule import Past


def now() -> str:
    """The time of day, in UTC and to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def begin(number: int) -> dict[str, Any]:
    """The record of a round in which nothing has happened yet."""
    return {
        "round": number,
        "started_at": now(),
        "reason": None,
        "plan": None,
        "degraded": False,
        # Each asked site's entry; complete() puts it beside the site's evaluation.
        "train": {},
        "seconds": {},
    }


def complete(
    record: Mapping[str, Any],
    *,
    sites: Mapping[str, Mapping[str, Any]],
    evaluated: Mapping[str, dict[str, Any]],
    server: Mapping[str, Any],
    model: str,
    checkpoint: str | None,
    seconds: Mapping[str, float],
    aggregation: float | None,
) -> dict[str, Any]:
    """The record of a round that is over: every site of the run, and what they add up to.

    A metric that was not measured is null. ``seconds`` are those of the phases in this process; a
    resumed round has those before its commit in ``record``. ``aggregation`` is how many it took to fold
    the updates in and combine them.
    """
    trained: Mapping[str, dict[str, Any]] = record["train"]
    asked = [*trained.values(), *evaluated.values()]
    completed = [entry for entry in trained.values() if entry["state"] == State.COMPLETED]
    return {
        **{key: value for key, value in record.items() if key != "train"},
        "ended_at": now(),
        "committed": checkpoint is not None,
        "model": model,
        "checkpoint": checkpoint,
        "sites": {
            name: {
                "dataset": about["dataset"],
                "train": trained.get(name),
                "evaluate": evaluated.get(name),
            }
            for name, about in sites.items()
        },
        "aggregate": {
            "train_loss": mean_loss(trained.values()),
            "frames": sum(entry["frames"] for entry in completed) if record["round"] else None,
            "loss": mean_loss(evaluated.values()),
            "rmse_deg": mean_rmse(evaluated.values()),
            "participation": len(completed) / len(trained) if trained else None,
            "seconds": aggregation,
        },
        "server": dict(server),
        "bytes": {
            way: sum(entry[f"bytes_{way}"] or 0 for entry in asked) for way in ("down", "up")
        },
        "seconds": {**record["seconds"], **seconds},
    }


def history(records: Sequence[Mapping[str, Any]]) -> list[Past]:
    """What the records say to the schedule, one for each round.

    Means over different sites do not compare. So each loss is the mean over the sites that the
    newest evaluation measured, weighted by its frames, and null in a round that lacks one of them:
    a site that left does not end all comparison, and one that joined begins it anew.
    """
    measured = [_measured(record) for record in records]
    weights = {
        name: frames
        for name, (_, frames) in next((found for found in reversed(measured) if found), {}).items()
    }
    return [
        Past(
            mean_loss({"loss": found[name][0], "frames": weights[name]} for name in weights)
            if weights.keys() <= found.keys()
            else None,
            {name: loss for name, (loss, _) in found.items()},
        )
        for found in measured
    ]


def _measured(record: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """The held-out loss and frames of each site that has them."""
    results = {name: site["evaluate"] or {} for name, site in record["sites"].items()}
    return {
        name: (result["loss"], result["frames"])
        for name, result in results.items()
        if result.get("loss") is not None and result.get("frames")
    }
