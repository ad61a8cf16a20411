"""Training steps: lerobot's own loop, and ours over cached prefixes; README.md says how to run it."""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from app.dataset import SiteDataset, open_dataset
from app.frames import Frames
from app.loader import Loader
from app.optimizer import OptimizerState
from app.policy import Processors, frozen_hash, load_policy, load_processors
from app.prefix_cache import PrefixCache
from app.statistics import moments_of, normalisation
from app.tiny_base import ensure_tiny_base
from app.training import noise_seed, train
from benchmarks.data.recording import record
from benchmarks.shapes import real_size
from benchmarks.training.stock import Stock

STOCK, OURS = "lerobot", "vlafleet"


class Site:
    """One policy of random weights that both loops train in turn, and the data that both read."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        models = options.models or place
        self.base = ensure_tiny_base(models) if options.model == "tiny" else real_size(models)
        data = record(place / "data", 2, options.frames, video=True)
        # One episode to train on; the other is held out.
        self.dataset: SiteDataset = open_dataset(str(data), held_out=0.5, seed=0)
        self.policy: Any = load_policy(self.base, options.device)
        self.processors: Processors = load_processors(
            self.base, self.policy, normalisation(moments_of(self.dataset))
        )
        self.place, self.options = place, options

    def loader(self) -> Loader:
        """Ours, with the fastest tier that has the space."""
        frames = Frames(self.dataset, self.dataset.train_episodes)
        cache = PrefixCache.open(
            self.policy,
            self.processors,
            frames,
            range(len(frames)),
            choice="auto",
            frozen=frozen_hash(self.base),
            folder=self.place / "cache",
            progress=lambda *_: None,
        )
        return Loader(self.policy, self.processors, frames, cache)

    def stock(self, steps: int) -> Stock:
        """lerobot's, which plans for so many steps in all."""
        return Stock(
            self.policy,
            self.processors,
            self.dataset,
            batch_size=self.options.batch_size,
            steps=steps,
            workers=self.options.workers,
        )


class Ours:
    """Our loop in rounds, the moments carried over as the trainer does."""

    def __init__(self, site: Site, loader: Loader) -> None:
        self._site, self._loader = site, loader
        self._state: OptimizerState | None = None
        self._step = 0

    def round(self, steps: int, learning_rate: Callable[[int], float] = lambda _: 1e-5) -> float:
        """Take so many steps; the last one's loss."""
        result = train(
            self._site.policy,
            self._loader,
            steps=steps,
            batch_size=self._site.options.batch_size,
            learning_rate=learning_rate,
            seed=0,
            global_step=self._step,
            progress=lambda *_: None,
            compiled=self._site.options.compile,
            optimizer_state=self._state,
        )
        self._state = result.optimizer_state
        self._step += steps
        return result.last_loss


def speed(site: Site) -> None:
    """Alternate rounds of both loops; print samples and processor seconds, medians and spread."""
    options = site.options
    started = time.perf_counter(), time.process_time()
    loader = site.loader()
    built = time.perf_counter() - started[0], time.process_time() - started[1]
    ours = Ours(site, loader)
    stock = site.stock(options.steps * (options.repeat + 1))

    def stock_round() -> None:
        for _ in range(options.steps):
            stock.step()

    ways: Mapping[str, Callable[[], object]] = {
        STOCK: stock_round,
        OURS: lambda: ours.round(options.steps),
    }
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    samples = options.steps * options.batch_size
    # The first of each allocates, and on a GPU chooses its kernels.
    for number in range(-1 if options.warm else 0, options.repeat):
        for way, take in ways.items():
            before = time.perf_counter(), time.process_time()
            take()
            took = time.perf_counter() - before[0], time.process_time() - before[1]
            if number >= 0:
                wall[way].append(samples / took[0])
                cpu[way].append(took[1] / samples)
    print("| loop | samples/s | of lerobot's | processor s a sample | of lerobot's |")
    print("|---|---|---|---|---|")
    for way in ways:
        cells = [way]
        for values in (wall, cpu):
            median = statistics.median(values[way])
            cells.append(f"{median:.3f} ({min(values[way]):.3f} to {max(values[way]):.3f})")
            cells.append(f"{median / statistics.median(values[STOCK]):.2f}")
        print("| " + " | ".join(cells) + " |")
    wall_s, cpu_s = (seconds / len(loader.frames) for seconds in built)
    print(f"\nprefix cache, once: {wall_s:.2f} s and {cpu_s:.2f} processor s a frame")
    print(json.dumps({"samples_per_s": wall, "processor_s": cpu}), file=sys.stderr)


def curves(site: Site) -> None:
    """Both loops from the same weights, draws and learning rates; print how far their losses are apart."""
    import torch

    steps = site.options.steps
    weights = {name: value.clone() for name, value in site.policy.state_dict().items()}
    stock = site.stock(steps)
    expected, rates = [], []
    for step in range(steps):
        rates.append(stock.rate)
        expected.append(stock.step(partial(torch.manual_seed, noise_seed(0, step))))
    site.policy.load_state_dict(weights)
    ours = Ours(site, site.loader())
    found = [ours.round(1, rates.__getitem__) for _ in range(steps)]
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    print(f"loss {expected[0]:.4f} to {expected[-1]:.4f} in {steps} steps")
    print(
        f"furthest apart {max(apart):.1e}, "
        f"{max(a / b for a, b in zip(apart, expected, strict=True)):.1e} of the loss"
    )
    print(json.dumps({"lerobot": expected, "vlafleet": found}), file=sys.stderr)


def main() -> None:
    """Compare speeds, or curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "curves"])
    parser.add_argument("--model", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--models", type=Path, help="where models are kept; else made anew")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="of a repetition, or of the curves")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of each loop")
    parser.add_argument("--warm", action="store_true", help="an uncounted repetition first")
    parser.add_argument("--frames", type=int, default=64, help="of the episode trained on")
    parser.add_argument("--workers", type=int, default=0, help="of lerobot's DataLoader")
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    parser.add_argument("--compile", action="store_true", help="our step")
    options = parser.parse_args()

    import torch

    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        site = Site(options, Path(place))
        {"speed": speed, "curves": curves}[options.what](site)


if __name__ == "__main__":
    main()
