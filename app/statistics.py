"""Normalisation statistics pooled over sites: each site sends count, mean and M2, and no frame.

Pairwise updates after T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances", 1979; everything in float64.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.dataset_meta import JOINTS, VECTORS
from certs.errors import DatasetError

if TYPE_CHECKING:
    from app.dataset import SiteDataset

type Vector = NDArray[np.float64]

# Degrees (per cent for the gripper). An encoder tick is 360/4096 = 0.09 degrees and the gears have about a degree of
# play: a joint with less spread stood still, and dividing by that spread would turn its noise into the largest input.
STD_FLOOR = 1.0


@dataclass(frozen=True)
class Moments:
    """Count, mean [6] and M2 [6], the sum of squared deviations from the mean, in degrees and degrees squared."""

    count: int
    mean: Vector
    m2: Vector


def moments_of(dataset: "SiteDataset") -> dict[str, Moments]:
    """Moments of state and action over the training episodes' frames, read from the data files themselves.

    The dataset's own stats.json covers held-out episodes too and was summed in float32. Raises DatasetError for
    values that are not finite, and for rows that do not fit the metadata.
    """
    columns = _columns(dataset)
    return {key: _moments(values) for key, values in columns.items()}


def merge(parts: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of all parts together."""
    merged: dict[str, Moments] = {}
    for part in parts:
        for key in VECTORS:
            merged[key] = _merge(merged[key], part[key]) if key in merged else part[key]
    if not merged:
        raise DatasetError(
            "no site sent statistics: a run needs at least one site with training episodes."
        )
    return merged


def normalisation(moments: Mapping[str, Moments]) -> dict[str, dict[str, Vector]]:
    """Mean and standard deviation [6] of each key, the latter at least STD_FLOOR."""
    return {
        key: {"mean": part.mean.copy(), "std": np.maximum(np.sqrt(part.m2 / part.count), STD_FLOOR)}
        for key, part in moments.items()
    }


def to_bytes(moments: Mapping[str, Moments]) -> bytes:
    """JSON; Python writes floats with the digits that restore every bit."""
    return json.dumps(
        {
            key: {"count": part.count, "mean": part.mean.tolist(), "m2": part.m2.tolist()}
            for key, part in moments.items()
        }
    ).encode()


def from_bytes(data: bytes) -> dict[str, Moments]:
    """Read what :func:`to_bytes` wrote. Raises DatasetError for anything else: it comes from another machine."""
    try:
        content = json.loads(data)
        moments = {key: _read(content[key]) for key in VECTORS}
        if len(content) != len(VECTORS):
            raise ValueError("unknown keys")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"statistics cannot be read ({type(error).__name__}: {error}): the site must run the same version."
        ) from error
    return moments


def _read(entry: Any) -> Moments:
    count = entry["count"]
    vectors = [np.asarray(entry[name], np.float64) for name in ("mean", "m2")]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count {count!r}")
    if any(vector.shape != (len(JOINTS),) or not np.isfinite(vector).all() for vector in vectors):
        raise ValueError("not six finite numbers")
    if (vectors[1] < 0).any():
        raise ValueError("a negative sum of squares")
    return Moments(count, *vectors)


def _moments(values: Vector) -> Moments:
    """Two passes: deviations from the mean, not E[x^2] - E[x]^2, which cancels."""
    mean = values.mean(axis=0)
    return Moments(len(values), mean, ((values - mean) ** 2).sum(axis=0))


def _merge(left: Moments, right: Moments) -> Moments:
    count = left.count + right.count
    delta = right.mean - left.mean
    return Moments(
        count,
        left.mean + delta * (right.count / count),
        left.m2 + right.m2 + delta**2 * (left.count * right.count / count),
    )


def _columns(dataset: "SiteDataset") -> dict[str, Vector]:
    """State and action [frames, 6] of the training episodes."""
    files = dataset.meta.data_files(dataset.train_episodes)
    parts = [_of_file(dataset.root / file, episodes) for file, episodes in files.items()]
    return {key: np.concatenate([part[key] for part in parts]) for key in VECTORS}


def _of_file(path: Path, episodes: list[int]) -> dict[str, Vector]:
    """The rows of these episodes in one data file."""
    from app.columns import read_columns

    columns = read_columns(path, ["episode_index", *VECTORS])
    chosen = np.isin(columns["episode_index"], episodes)
    owner = columns["episode_index"][chosen]
    vectors = {key: columns[key][chosen].astype(np.float64) for key in VECTORS}
    for key, values in vectors.items():
        broken = ~np.isfinite(values).all(axis=1)
        if broken.any():
            raise DatasetError(
                f"episode {owner[broken][0]} in {path} holds values of {key} that are not finite: "
                "delete or record the episode again."
            )
    return vectors
