"""Federated averaging of updates as they arrive (FedAvg, McMahan et al. 2017, arXiv:1602.05629).

Memory is one model's worth of fp32 sums, however many sites report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from app.payload import Payload, PayloadError, Tensors, check_tensors

# Far beyond any change a training run makes (fp32 ends at 3.4e38), and low enough that a sum
# weighted with MAX_FRAMES frames at each of 10 000 sites cannot overflow.
MAX_MAGNITUDE = np.float32(1e24)
# Frames one site can train on in a round: a year at 30 frames a second.
MAX_FRAMES = 1_000_000_000


class Accumulator:
    """The running weighted mean of deltas against one base model; weights are frames."""

    def __init__(self, base: Tensors, *, base_hash: str, frozen_hash: str) -> None:
        self._base = base
        self._base_hash = base_hash
        self._frozen_hash = frozen_hash
        self._sums = {name: np.zeros_like(array) for name, array in base.items()}
        self.frames = 0
        self.updates = 0

    def add(self, update: Payload, frames: int) -> None:
        """Fold in ``update``, or raise ``PayloadError`` and leave the mean as it was."""
        self._check(update, frames)
        for name, delta in update.tensors.items():
            self._sums[name] += delta * np.float32(frames)
        self.frames += frames
        self.updates += 1

    def _check(self, update: Payload, frames: int) -> None:
        if update.base != self._base_hash:
            raise PayloadError(
                "base",
                f"The update was made against model {update.base[:12]}, this round's is "
                f"{self._base_hash[:12]}.",
            )
        if update.frozen != self._frozen_hash:
            raise PayloadError(
                "frozen",
                f"The site's frozen tensors are {update.frozen[:12]}, the federation's are "
                f"{self._frozen_hash[:12]}: use the same base model everywhere.",
            )
        check_tensors(update.tensors, self._base)
        if not 0 < frames <= MAX_FRAMES:
            raise PayloadError("frames", f"The update claims {frames} frames.")
        for name, delta in update.tensors.items():
            # A comparison with NaN is false: this refuses NaN and infinity as well.
            if delta.size and not bool(np.abs(delta).max() <= MAX_MAGNITUDE):
                raise PayloadError(
                    "finite", f"Tensor {name} of the update is not finite, or is beyond 1e24."
                )

    def model(self) -> Tensors:
        """The base plus the mean update, fp32; needs at least one update."""
        if not self.updates:
            raise ValueError("no update was added")
        weight = np.float32(self.frames)
        return {name: base + self._sums[name] / weight for name, base in self._base.items()}


def mean_loss(sites: Iterable[Mapping[str, Any]]) -> float | None:
    """The sites' ``loss`` weighted by their ``frames``; null where no site measured it."""
    measured = [
        (site["loss"], site["frames"])
        for site in sites
        if site["loss"] is not None and math.isfinite(site["loss"]) and site["frames"]
    ]
    frames = sum(weight for _, weight in measured)
    return float(sum(loss * weight for loss, weight in measured) / frames) if frames else None


def mean_rmse(sites: Iterable[Mapping[str, Any]]) -> list[float] | None:
    """Root mean square error of each joint over all sites' frames, degrees."""
    measured = [
        (site["rmse_deg"], site["frames"]) for site in sites if site["rmse_deg"] and site["frames"]
    ]
    frames = sum(weight for _, weight in measured)
    if not frames:
        return None
    squares = [[joint**2 * weight for joint in joints] for joints, weight in measured]
    return [math.sqrt(sum(joint) / frames) for joint in zip(*squares, strict=True)]
