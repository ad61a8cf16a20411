"""Combining updates: FedAvg (McMahan et al. 2017, arXiv:1602.05629), or a robust mean.

An accepted update is kept on disk as it came, still encoded, and all are combined at the commit:
one tensor at a time, sites in order of name. So memory is a few tensors' worth however many sites
report, the order of arrival changes no bit, and a robust mean sees every update.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from app.payload import Payload, PayloadError, check_tensors
from certs.errors import StorageError

# Far beyond any change a training run makes (fp32 ends at 3.4e38), and its square, which FedAdam
# keeps, is still a finite fp32.
MAX_MAGNITUDE = 1e18
# Frames one site can train on in a round: a year at 30 frames a second.
MAX_FRAMES = 1_000_000_000
# Values of all sites that a robust mean sorts at a time (32 MB): more sites are sorted in more,
# narrower chunks, and each update's tensor is then decoded once a chunk.
_SORTED = 1 << 23
# Values worked on at a time: some rows of them stay in the processor's cache.
_CACHED = 1 << 16


@dataclass(frozen=True)
class _Kept:
    update: Payload
    frames: int


class Updates:
    """One round's accepted updates, in ``folder`` until the ``with`` block ends."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        base_hash: str,
        frozen_hash: str,
        norm_bound: float = 0.0,
    ) -> None:
        """Empty ``folder``; updates must be of ``shapes`` and, unless 0, within ``norm_bound``."""
        self._folder, self._shapes, self._norm_bound = folder, shapes, norm_bound
        self._base_hash, self._frozen_hash = base_hash, frozen_hash
        self._kept: dict[str, _Kept] = {}
        # Spent within ``timed``: on taking updates in, and on combining them.
        self.seconds = 0.0
        try:
            # What a process that died in this round left behind.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise self._storage(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose updates were accepted, in order of name."""
        return tuple(sorted(self._kept))

    @property
    def frames(self) -> int:
        """Frames that all accepted updates were trained on."""
        return sum(kept.frames for kept in self._kept.values())

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what the block takes to ``seconds``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

    def add(self, site: str, update: Payload, frames: int) -> float:
        """Keep ``update`` and return its L2 norm; what raises (``PayloadError``) is not kept."""
        if site in self._kept:
            raise ValueError(f"{site} has an update in this round already")
        norm = self._check(update, frames)
        # Numbered: a site's name need not be fit for a file's.
        path = self._folder / f"{len(self._kept):05d}"
        try:
            update.write(path)
            self._kept[site] = _Kept(Payload.open(path), frames)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._storage(error) from error
        return norm

    def mean(
        self, name: str, *, robust: str = "none", trim: float = 0.2
    ) -> npt.NDArray[np.float32]:
        """The mean of tensor ``name`` over all updates; ``ValueError`` where there is none.

        ``none`` weights by frames. ``trimmed-mean`` drops the share ``trim`` of each value's lowest
        and highest, rounded up so that three sites suffice to drop one, and ``median`` all but the
        middle (Yin et al. 2018, arXiv:1803.01498); both are without weights, which a site claims.
        """
        if not self._kept:
            raise ValueError("no update was added")
        with self.timed():
            updates = [self._kept[site] for site in self.sites]
            most = (len(updates) - 1) // 2
            if robust == "none":
                return self._weighted(name, updates)
            if robust == "median":
                return self._middle(name, updates, most)
            # 0.07 * 100 is 7.000000000000001 to a computer, and is not to drop eight.
            return self._middle(name, updates, min(math.ceil(trim * len(updates) - 1e-9), most))

    def close(self) -> None:
        """Remove the folder."""
        self._kept.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _weighted(self, name: str, updates: list[_Kept]) -> npt.NDArray[np.float32]:
        # float64, of one tensor alone: equal updates give that very update, and the mean is never
        # outside the updates' range.
        total = np.zeros(self._shapes[name])
        for kept in updates:
            total += np.multiply(kept.update.tensor(name), kept.frames, dtype=np.float64)
        return np.asarray(total / self.frames, np.float32)

    def _middle(self, name: str, updates: list[_Kept], drop: int) -> npt.NDArray[np.float32]:
        shape, sites = self._shapes[name], len(updates)
        mean = np.empty(math.prod(shape), np.float32)
        width = min(max(_SORTED // sites, 1), max(mean.size, 1))
        rows = np.empty((sites, width), np.float32)
        for start in range(0, mean.size, width):
            chunk = mean[start : start + width]
            for row, kept in zip(rows, updates, strict=True):
                row[: chunk.size] = kept.update.tensor(name).reshape(-1)[start : start + width]
            for first in range(0, chunk.size, _CACHED):
                part = chunk[first : first + _CACHED]
                columns = rows[:, first : first + part.size]
                _sort(columns)
                part[:] = columns[drop : sites - drop].mean(axis=0, dtype=np.float64)
        return mean.reshape(shape)

    def _check(self, update: Payload, frames: int) -> float:
        if update.base != self._base_hash:
            raise PayloadError(
                "base",
                f"The update was made against model {str(update.base)[:12]}, this round's is "
                f"{self._base_hash[:12]}.",
            )
        if update.frozen != self._frozen_hash:
            raise PayloadError(
                "frozen",
                f"The site's frozen tensors are {update.frozen[:12]}, the federation's are "
                f"{self._frozen_hash[:12]}: use the same base model everywhere.",
            )
        check_tensors(update.shapes, self._shapes)
        if not 0 < frames <= MAX_FRAMES:
            raise PayloadError("frames", f"The update claims {frames} frames.")
        norm = math.sqrt(sum(_square(name, delta) for name, delta in update.items()))
        if self._norm_bound and norm > self._norm_bound:
            raise PayloadError(
                "norm",
                f"The update's norm is {norm:.4g}, beyond the norm-bound of {self._norm_bound:g}.",
            )
        return norm

    def _storage(self, error: OSError) -> StorageError:
        return StorageError(
            f"An update cannot be kept in {self._folder} ({error.strerror}): free space there, or "
            "check who owns the directory that VLAFLEET_RUNS names."
        )


def _sort(rows: npt.NDArray[np.float32]) -> None:
    """Sort each column in place, comparing whole rows: numpy's sort takes 15 times as long for two sites.

    Batcher's odd-even merge sort (Knuth, The Art of Computer Programming 3, 5.2.2, Algorithm M).
    """
    count, lesser = len(rows), np.empty(rows.shape[1:], np.float32)
    run = 1
    while run < count:
        apart = run
        while apart:
            for start in range(apart % run, count - apart, 2 * apart):
                for low in range(start, min(start + apart, count - apart)):
                    high = low + apart
                    if low // (2 * run) == high // (2 * run):
                        np.minimum(rows[low], rows[high], out=lesser)
                        np.maximum(rows[low], rows[high], out=rows[high])
                        rows[low] = lesser
            apart //= 2
        run *= 2


def _square(name: str, delta: npt.NDArray[np.float32]) -> float:
    """The sum of squares of one tensor; ``PayloadError`` where a value is not to be trusted."""
    # A comparison with NaN is false: this refuses NaN and infinity as well.
    if delta.size and not (delta.max() <= MAX_MAGNITUDE and delta.min() >= -MAX_MAGNITUDE):
        raise PayloadError(
            "finite", f"Tensor {name} of the update is not finite, or is beyond 1e18."
        )
    flat, total = delta.reshape(-1), 0.0
    for start in range(0, flat.size, _CACHED):
        # fp32 would overflow here, and round the norm of a hundred million values.
        part = flat[start : start + _CACHED].astype(np.float64)
        total += float(part @ part)
    return total


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
