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

from certs.errors import DatasetError

if TYPE_CHECKING:
    from app.dataset import SiteDataset

type Vector = NDArray[np.float64]

# observation.state and action, six joints each.
KEYS = ("observation.state", "action")
DIMENSIONS = 6
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
        for key in KEYS:
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
        moments = {key: _read(content[key]) for key in KEYS}
        if len(content) != len(KEYS):
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
    if any(vector.shape != (DIMENSIONS,) or not np.isfinite(vector).all() for vector in vectors):
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
    by_file: dict[Path, list[int]] = {}
    for index in dataset.train_episodes:
        by_file.setdefault(dataset.root / dataset.meta.episodes[index].data, []).append(index)
    parts = [_read_file(dataset, path, episodes) for path, episodes in by_file.items()]
    return {key: np.concatenate([part[key] for part in parts]) for key in KEYS}


def _read_file(dataset: "SiteDataset", path: Path, episodes: list[int]) -> dict[str, Vector]:
    """The rows of these episodes in one data file, checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Selected in numpy: pyarrow's filters would import pandas, a second of CPU.
        with pq.ParquetFile(path) as file:
            table = file.read(columns=["episode_index", *KEYS])
        owner = _numbers(table["episode_index"])
        chosen = np.isin(owner, episodes)
        owner = owner[chosen]
        columns = {key: _matrix(table[key])[chosen] for key in KEYS}
    except (OSError, pa.ArrowException, ValueError, TypeError, LookupError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise DatasetError(f"{path} cannot be read ({reason}): copy the dataset again.") from error
    for index in episodes:
        rows, frames = int((owner == index).sum()), dataset.frames([index])
        if rows != frames:
            raise DatasetError(
                f"{path} holds {rows} frames of episode {index} where the metadata counts {frames}: "
                "copy the dataset again, whole."
            )
    for key, values in columns.items():
        broken = ~np.isfinite(values).all(axis=1)
        if broken.any():
            raise DatasetError(
                f"episode {owner[broken][0]} in {path} holds values of {key} that are not finite: "
                "delete or record the episode again."
            )
    return columns


def _matrix(column: Any) -> Vector:
    """A parquet column of lists as [rows, 6]; a reshape alone would not notice rows of other lengths."""
    import pyarrow.compute as pc

    if (_numbers(pc.list_value_length(column)) != DIMENSIONS).any():
        raise ValueError(f"a row is not {DIMENSIONS} joints wide")
    return _numbers(pc.list_flatten(column)).astype(np.float64).reshape(-1, DIMENSIONS)


def _numbers(column: Any) -> NDArray[Any]:
    """A numeric pyarrow column as numpy reads its buffer; pyarrow's own conversions would import pandas."""
    array = column.combine_chunks()
    if array.null_count:
        raise ValueError("a value is missing")
    dtypes = {"float": np.float32, "double": np.float64, "int32": np.int32, "int64": np.int64}
    dtype = dtypes.get(str(array.type))
    if dtype is None:
        raise ValueError(f"values are of type {array.type}")
    return np.frombuffer(
        array.buffers()[1], dtype, count=len(array), offset=array.offset * np.dtype(dtype).itemsize
    )
