"""Records of runs as the ServerApp writes them (journal schema 2), for the tests of what reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.config import RunConfig
from app.journal import Journal

SITE = {
    "dataset": "pick-cubes",
    "train_episodes": 8,
    "held_out_episodes": 2,
    "train_frames": 381,
    "held_out_frames": 97,
    "fps": 30,
    "cameras": ["top", "wrist"],
    "tasks": ["Pick up the red block."],
}


def trained(**other: Any) -> dict[str, Any]:
    """A site's entry of a completed training."""
    return {
        "state": "completed",
        "reason": None,
        "seconds": 12.5,
        "bytes_down": 200_000,
        "bytes_up": 100_000,
        "form": "delta",
        "loss": 0.6,
        "last_loss": 0.5,
        "proximal_loss": None,
        "grad_norm": 3.9,
        "update_norm": 1.0,
        "payload_sha256": "ab" * 32,
        "frames": 240,
        "learning_rate": [1e-3, 1e-4],
        "work_seconds": 5.0,
        "ready_seconds": 2.0,
        **other,
    }


def evaluated(loss: float | None, **other: Any) -> dict[str, Any]:
    """A site's entry of an evaluation: completed, or timed out where ``loss`` is None."""
    ended = (
        {"state": "completed", "reason": None}
        if loss is not None
        else {"state": "timeout", "reason": "no reply within 600 s"}
    )
    return {
        **ended,
        "seconds": 4.0,
        "bytes_down": 0,
        "bytes_up": 0,
        "form": "held",
        "loss": loss,
        "rmse_deg": None if loss is None else [loss * 10 + joint for joint in range(6)],
        "frames": None if loss is None else 64,
        "work_seconds": 3.0,
        "ready_seconds": 1.0,
        **other,
    }


def record(
    number: int, losses: Mapping[str, float | None], *, committed: bool = True, **other: Any
) -> dict[str, Any]:
    """A round with these held-out losses; one that failed trained nothing and evaluated nothing."""
    known = [loss for loss in losses.values() if loss is not None]
    missed = {"state": "timeout", "reason": "no reply within 600 s"}
    nothing = dict.fromkeys(("loss", "last_loss", "grad_norm", "update_norm", "frames", "form"))
    train = trained() if committed else trained(**missed, **nothing)
    return {
        "round": number,
        "committed": committed,
        "degraded": False,
        "reason": None if committed else "no valid update: the last model stays",
        "started_at": "2026-01-01T00:00:00+00:00",
        "model": f"{number:064x}",
        "checkpoint": f"checkpoints/round-{number:04d}" if committed else None,
        "plan": {"learning_rate": [1e-3, 1e-4], "scale": 1.0, "mu": 0.0} if number else None,
        "sites": {
            site: {
                "dataset": SITE["dataset"],
                "train": dict(train) if number else None,
                "evaluate": evaluated(loss) if committed else None,
            }
            for site, loss in losses.items()
        },
        "aggregate": {
            "train_loss": 0.6 if number and committed else None,
            "frames": 240 * len(losses) if number and committed else None,
            "loss": sum(known) / len(known) if known and committed else None,
            "rmse_deg": [10.0 + joint for joint in range(6)] if known and committed else None,
            "participation": float(committed) if number else None,
        },
        "server": {},
        "best": 0,
        "bytes": {"down": 200_000 * len(losses), "up": 100_000 * len(losses)},
        "seconds": {"dispatch": 0.1, "collect": 12.4, "commit": 0.2, "evaluate": 4.0},
        **other,
    }


def run(
    root: Path,
    records: list[dict[str, Any]],
    *,
    name: str = "17",
    sites: Mapping[str, Any] | None = None,
    model: str = "lerobot/smolvla_base",
    ended: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run's directory with these records of rounds; ``settings`` are run-config keys with underscores."""
    config = RunConfig(**{"rounds": max(len(records) - 1, 1), "model": model, **settings})
    journal = Journal(root, name)
    names = sorted({site for one in records for site in one["sites"]})
    journal.describe(
        {
            "run": name,
            "runs": [name],
            "started_at": "2026-01-01T00:00:00+00:00",
            "ended": ended,
            "config": config.as_dict(),
            "model": {
                "name": model,
                "hash": "0" * 64,
                "frozen": "1" * 64,
                "trainable_tensors": 155,
                "trainable_values": 99_880_992,
            },
            "sites": dict.fromkeys(names, SITE) if sites is None else sites,
            "statistics": {},
        }
    )
    for one in records:
        journal.append(one)
    journal.close()
    return journal.directory
