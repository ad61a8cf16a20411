"""Seconds of a round that are neither training nor Flower's: before the first step, and after the last one.

A process per message that does the work itself takes turns with one that hands it to the resident trainer.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from app import payload
from app.config import RunConfig
from app.policy import frozen_hash, trainable_names
from app.supervisor import SOCKET, supervised
from app.tensorfile import WEIGHTS, Lazy
from app.tiny_base import ensure_tiny_base
from benchmarks.round_overhead.stamps import FILE
from benchmarks.shapes import real_size
from tests.recorder import record

# Neither model's steps are what is measured: few, and in the real size on a CPU, one.
STEPS = {"tiny": (3, 4), "real": (1, 1)}


@dataclass
class Site:
    """One site and its server: it is asked as a run asks, and has what it holds below ``home``."""

    base: Path
    data: Path
    home: Path
    config: RunConfig
    environment: dict[str, str]
    statistics: str = ""
    seconds: list[dict[str, float]] = field(default_factory=list)

    def begin(self) -> None:
        """Describe the site, and evaluate the model that the run starts from."""
        self.home.mkdir()
        self._tensors: payload.Tensors = Lazy(self.base / WEIGHTS, trainable_names(self.base))
        self._model = payload.canonical_hash(self._tensors)
        self._frozen = frozen_hash(self.base)
        reply = self._ask("query", 0, None)
        self.statistics = reply["description"]["moments"]
        self._ask("evaluate", 0, self._held())

    def round(self, number: int) -> None:
        """Train the model, and evaluate what came out."""
        self._ask("train", number, self._held())
        update = payload.Payload.open(self.home / "update")
        self._tensors = {name: self._tensors[name] + change for name, change in update.items()}
        before, self._model = self._model, payload.canonical_hash(self._tensors)
        delta = payload.pack(
            update.items(),
            kind="model",
            codec=self.config.codec,
            base=before,
            target=self._model,
            frozen=self._frozen,
        )
        self._ask("evaluate", number, delta)

    def _held(self) -> payload.Payload:
        return payload.pack(
            (), kind="model", codec="fp32", base=self._model, target=self._model,
            frozen=self._frozen,
        )  # fmt: skip

    def _ask(self, kind: str, number: int, model: payload.Payload | None) -> dict[str, Any]:
        told = {"round": number, "statistics": self.statistics, "scale": 1.0, "mu": 0.0}
        request = {"lineage": "1", "config": json.dumps(self.config.as_dict()), **told}
        node = {"site": "site-a", "dataset": str(self.data), "device": "cpu"}
        job = {"kind": kind, "node": node, "request": request}
        (self.home / "job.json").write_text(json.dumps(job))
        (self.home / "model").unlink(missing_ok=True)
        if model:
            model.write(self.home / "model")
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.round_overhead.message", str(self.home)],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        called, replied = json.loads(done.stdout.splitlines()[-1])
        if kind != "query":
            first, last = json.loads((self.home / "stamps").read_text())
            self.seconds.append(
                {
                    "round": number,
                    f"{kind} start": called - started,
                    f"{kind} ready": first - called,
                    f"{kind} reply": replied - last,
                    f"{kind} work": last - first,
                }
            )
        found: dict[str, Any] = json.loads((self.home / "reply.json").read_text())
        return found


@contextlib.contextmanager
def site(way: str, size: str, rounds: int, models: Path, data: Path, place: Path) -> Iterator[Site]:
    """A site that answers by a process per message (``stock``) or with the resident trainer."""
    base = real_size(models) if size == "real" else ensure_tiny_base(models)
    steps, batch = STEPS[size]
    config = RunConfig(
        model=str(base),
        rounds=rounds,
        local_steps=steps,
        batch_size=batch,
        eval_batches=1,
        round_timeout=3600.0,
        # Without a process that stays there is nothing to keep prefixes in.
        prefix_cache="memory" if way == "resident" else "none",
    )
    home = place / f"{way}-{size}"
    environment = {"VLAFLEET_HOME": str(home), FILE: str(home / "stamps")}
    if way == "stock":
        yield Site(base, data, home, config, environment)
        return
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with supervised((sys.executable, "-m", "benchmarks.round_overhead.trainer")) as path:
            yield Site(base, data, home, config, {**environment, SOCKET: str(path)})
    finally:
        os.environ.clear()
        os.environ.update(before)


def main() -> None:
    """Print a table for one size of model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=STEPS, default="tiny")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--models", type=Path, help="keep generated bases here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        place = Path(folder)
        models = options.models or place / "models"
        data = record(place / "data", (30, 35, 40))
        sites = {
            way: stack.enter_context(site(way, options.size, options.rounds, models, data, place))
            for way in ("stock", "resident")
        }
        for one in sites.values():
            one.begin()
        for number in range(1, options.rounds + 1):
            for one in sites.values():
                one.round(number)
    print(f"{options.size}: median (least to most) seconds of rounds 2 to {options.rounds}")
    for part in ("start", "ready", "reply", "work"):
        for kind in ("train", "evaluate"):
            key, cells, medians = f"{kind} {part}", [], []
            for one in sites.values():
                values = [s[key] for s in one.seconds if key in s and s["round"] >= 2]
                first = [s[key] for s in one.seconds if key in s and s["round"] < 2]
                medians.append(median(values))
                cells.append(
                    f"{medians[-1]:.2f} ({min(values):.2f} to {max(values):.2f}; first {first[0]:.2f})"
                )
            print(f"| {key} | {' | '.join(cells)} | {medians[0] / medians[1]:.1f} |")


if __name__ == "__main__":
    main()
