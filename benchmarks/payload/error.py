"""How far quantised updates lead from exact ones, with and without error feedback; README.md says how to run it."""

import argparse
import math
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from app.codec import CODECS, decode, encode
from app.payload import encode_feedback
from benchmarks.payload.updates import Array, update
from benchmarks.shapes import SHAPES

type Sum = npt.NDArray[np.float64]

# Two layers, of either kind, and everything outside the layers: the other 14 have the same shapes.
TENSORS = {
    name: shape
    for name, shape in SHAPES.items()
    if ".layers." not in name or ".layers.0." in name or ".layers.1." in name
}
LOSSY = [codec for codec in CODECS if codec != "fp32"]


class Federation:
    """One tensor of all sites and the server in one codec: what was to change, and what did."""

    def __init__(self, codec: str, sites: int, feedback: bool) -> None:
        self._codec, self._feedback = codec, feedback
        self._residuals: list[Array | None] = [None] * sites
        self._residual: Array | None = None

    def up(self, site: int, delta: Array) -> Array:
        """What arrives of a site's update."""
        if not self._feedback:
            return decode(encode(delta, self._codec), delta.shape, self._codec)
        _, decoded, self._residuals[site] = encode_feedback(
            delta, self._residuals[site], self._codec
        )
        return decoded

    def down(self, mean: Array) -> Array:
        """What arrives of the server's change at the sites, and is added to the model at either end."""
        if not self._feedback:
            return decode(encode(mean, self._codec), mean.shape, self._codec)
        _, decoded, self._residual = encode_feedback(mean, self._residual, self._codec)
        return decoded


def measure(
    name: str, shape: tuple[int, ...], sites: int, rounds: int
) -> dict[tuple[str, ...], float]:
    """Sums of squares, over one tensor, of exact changes and of errors, by what they are of."""
    squares: dict[tuple[str, ...], float] = {}
    exact: Sum = np.zeros(shape)
    variants = [(codec, feedback) for codec in LOSSY for feedback in (False, True)]
    federations = {key: Federation(*key[:1], sites, key[1]) for key in variants}
    wrong = {(leg, *key): np.zeros(shape) for key in variants for leg in ("up", "both")}
    for number in range(1, rounds + 1):
        mean: Sum = np.zeros(shape)
        means = {key: np.zeros(shape) for key in variants}
        for site in range(sites):
            delta = update(name, shape, site, number)
            mean += delta
            for key in variants:
                means[key] += federations[key].up(site, delta)
        mean /= sites
        exact += mean
        for key in variants:
            means[key] /= sites
            wrong["up", *key] += means[key] - mean
            wrong["both", *key] += federations[key].down(means[key].astype(np.float32)) - mean
        if number in {1, rounds}:
            squares["exact", str(number)] = float((exact**2).sum())
            for (leg, codec, feedback), error in wrong.items():
                squares[leg, codec, str(feedback), str(number)] = float((error**2).sum())
    return squares


def main() -> None:
    """Print the relative L2 error of the change of the model after one round and after several."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    total: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for name, shape in TENSORS.items():
        for key, value in measure(name, shape, options.sites, options.rounds).items():
            total[key] += value
    print(f"{len(TENSORS)} tensors, {sum(map(math.prod, TENSORS.values())):,} values")
    first, last = "1", str(options.rounds)
    print(f"| codec | leg | 1 round | {last} rounds, no feedback | {last} rounds, feedback |")
    print("|---|---|---|---|---|")
    for codec in LOSSY:
        for leg in ("up", "both"):
            errors = [
                (total[leg, codec, feedback, number] / total["exact", number]) ** 0.5
                for feedback, number in (("False", first), ("False", last), ("True", last))
            ]
            print(f"| {codec} | {leg} | " + " | ".join(f"{error:.2g}" for error in errors) + " |")


if __name__ == "__main__":
    main()
