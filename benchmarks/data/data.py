"""Frames a second into the training step: LeRobotDataset and DataLoader, and ours; README.md says how to run it."""

import argparse
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.dataset import SiteDataset, open_dataset
from app.frames import Frames
from app.loader import Loader
from app.policy import frozen_hash, load_policy, load_processors
from app.prefix_cache import PrefixCache
from app.statistics import moments_of, normalisation
from benchmarks.data.recording import record

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

STOCK = "LeRobotDataset, DataLoader"


@dataclass
class Measured:
    """Frames a second, and milliseconds of processor time a frame, of each repetition."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


class Bench:
    """One dataset, read in each way; every way ends in a normalised batch on the device."""

    def __init__(self, root: Path, base: Path, policy: "SmolVLAPolicy", options: Any) -> None:
        self.dataset: SiteDataset = open_dataset(str(root), held_out=0.5, seed=0)
        self.policy, self.options = policy, options
        self.frames = Frames(self.dataset, self.dataset.episodes)
        moments = normalisation(moments_of(self.dataset))
        self.processors = load_processors(base, policy, moments)
        count = min(options.cached, len(self.frames))
        self.rows = np.linspace(0, len(self.frames) - 1, count).astype(np.int64)
        self.cache = self._open("auto" if options.device == "cuda" else "memory", base)
        self.cached = Loader(policy, self.processors, self.frames, self.cache)
        # What the loader gives where the VLM is trained: images for lerobot's own forward pass.
        with unfrozen(policy):
            none = self._open("none", base)
            self.plain = Loader(policy, self.processors, self.frames, none)
        self.opened = self.dataset.lerobot(self.dataset.episodes, policy.config.chunk_size)
        self.random = np.random.default_rng(0)

    def _open(self, choice: str, base: Path) -> PrefixCache:
        return PrefixCache.open(
            self.policy,
            self.processors,
            self.frames,
            self.rows,
            choice=choice,
            frozen=frozen_hash(base),
            folder=Path(self.options.place) / "cache",
            progress=lambda *_: None,
        )

    def ways(self) -> dict[tuple[str, int], tuple[int, Callable[[Sequence[int]], None]]]:
        """How many frames a repetition reads, and what reads them, by way and batch size."""
        small, large = 8, 64
        few = self.options.frames

        def stock(rows: Sequence[int]) -> None:
            self._stock(rows, small)

        def ours(loader: Loader, size: int) -> Callable[[Sequence[int]], None]:
            def read(rows: Sequence[int]) -> None:
                for start in range(0, len(rows), size):
                    loader.batch(rows[start : start + size])

            return read

        cached = f"ours, prefixes in {self.cache.tier}"
        return {
            (STOCK, small): (few, stock),
            ("ours, no cache", small): (8 * few, ours(self.plain, small)),
            (cached, small): (512, ours(self.cached, small)),
            (cached, large): (512, ours(self.cached, large)),
        }

    def _stock(self, rows: Sequence[int], size: int) -> None:
        """What lerobot-train does up to its forward pass."""
        import torch
        from torch.utils.data import DataLoader

        loader: DataLoader[Any] = DataLoader(
            self.opened,
            batch_size=size,
            sampler=list(rows),
            num_workers=self.options.workers,
            pin_memory=self.options.device == "cuda",
        )
        for batch in loader:
            for camera in self.dataset.cameras:
                if batch[camera].dtype == torch.uint8:
                    batch[camera] = batch[camera].float() / 255
            self.processors[0](batch)

    def measure(self, results: dict[tuple[str, int], Measured]) -> None:
        """Every way once, one after the other."""
        for key, (count, read) in self.ways().items():
            of = range(len(self.frames)) if key[0] in {STOCK, "ours, no cache"} else self.rows
            rows = self.random.choice(np.asarray(of), count, replace=count > len(of)).tolist()
            started, cpu = time.perf_counter(), processor_seconds()
            read(rows)
            synchronise(self.options.device)
            measured = results.setdefault(key, Measured())
            measured.rates.append(count / (time.perf_counter() - started))
            measured.cpu.append(1e3 * (processor_seconds() - cpu) / count)


@contextmanager
def unfrozen(policy: "SmolVLAPolicy") -> "Iterator[None]":
    """One tensor of the VLM would be trained, so no prefix of it is constant."""
    weight = next(policy.model.vlm_with_expert.vlm.parameters())
    weight.requires_grad = True
    try:
        yield
    finally:
        weight.requires_grad = False


def processor_seconds() -> float:
    """Seconds of all cores that this process and the workers it has ended took."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def synchronise(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def base_model(name: str, place: Path) -> Path:
    """The directory of the tiny base or of one of the real size, made if need be."""
    from app.tiny_base import ensure_tiny_base
    from benchmarks.shapes import real_size

    return ensure_tiny_base(place) if name == "tiny" else real_size(place)


def report(kind: str, results: dict[tuple[str, int], Measured]) -> None:
    """Print one line for each way."""
    stock = next(measured for (way, _), measured in results.items() if way == STOCK)
    for (way, size), measured in results.items():
        rate, cpu = statistics.median(measured.rates), statistics.median(measured.cpu)
        print(
            f"| {kind} | {way} | {size} | {rate:.3g} | {min(measured.rates):.3g} to {max(measured.rates):.3g} "
            f"| {rate / statistics.median(stock.rates):.3g} | {cpu:.3g} | {statistics.median(stock.cpu) / cpu:.3g} |"
        )


def main() -> None:
    """Alternate the ways on either dataset; print medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each way")
    parser.add_argument("--model", choices=["tiny", "real"], default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--length", type=int, default=60, help="frames of an episode")
    parser.add_argument("--frames", type=int, default=8, help="that lerobot reads at a time")
    parser.add_argument("--cached", type=int, default=240, help="frames in the prefix cache")
    parser.add_argument("--workers", type=int, default=0, help="processes of lerobot's DataLoader")
    parser.add_argument("--place", help="directory for datasets and models, kept; else a new one")
    options = parser.parse_args()
    logging.getLogger("flwr").addHandler(logging.StreamHandler())
    with tempfile.TemporaryDirectory() as folder:
        options.place = options.place or folder
        place = Path(options.place)
        base = base_model(options.model, place / "models")
        policy = load_policy(base, options.device)
        benches = {}
        for kind, video in (("video", True), ("images", False)):
            root = place / kind
            if not root.exists():
                record(root, options.episodes, options.length, video=video)
            benches[kind] = Bench(root, base, policy, options)
        results: dict[str, dict[tuple[str, int], Measured]] = {kind: {} for kind in benches}
        for _ in range(options.repeat):
            for kind, bench in benches.items():
                bench.measure(results[kind])
        print(
            "| dataset | way | batch | frames/s | min to max | of LeRobot's | CPU ms a frame | LeRobot's, of it |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for kind in benches:
            report(kind, results[kind])
        raw = {
            kind: {f"{way}, {size}": vars(one) for (way, size), one in ways.items()}
            for kind, ways in results.items()
        }
        print(json.dumps(raw), file=sys.stderr)
        for bench in benches.values():
            bench.cache.close()


if __name__ == "__main__":
    main()
