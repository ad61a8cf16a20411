"""Updates that look like a site's after a round: each tensor and row has its own scale, and the tails are heavy."""

import zlib

import numpy as np
import numpy.typing as npt

type Array = npt.NDArray[np.float32]


def update(name: str, shape: tuple[int, ...], site: int, number: int) -> Array:
    """The update of one tensor that ``site`` makes in round ``number``: the same in every call.

    A third of its variance is common to all sites and rounds, a third is the site's own in every
    round, and a third is new each time.
    """
    rows = (shape[0],) + (1,) * (len(shape) - 1) if len(shape) > 1 else (1,)
    scales = _random(name)
    # Tensors move by 1e-5 to 1e-3 in a round; rows of one tensor differ by a factor of 1.6 either way.
    scale = 10 ** scales.uniform(-5, -3) * scales.lognormal(0, 0.5, rows)
    total = _heavy(_random(name, 0), shape)
    total += _heavy(_random(name, 1, site), shape)
    total += _heavy(_random(name, 2, site, number), shape)
    total *= scale.astype(np.float32)
    return total


def _random(name: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), *key])


def _heavy(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Products of two normal values: variance 1, kurtosis 9 where a normal value has 3."""
    values = random.standard_normal(shape, np.float32)
    values *= random.standard_normal(shape, np.float32)
    return values
