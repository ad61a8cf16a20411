"""What a round's updates cost the ServerApp: memory and seconds with 1 to 16 sites of the real model's size.

The ServerApp is the real one, in a process of its own; see superlink.py for what stands in for the rest, and README.md
for how to run it.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from app.journal import read_rounds
from app.payload import canonical_hash, pack
from app.policy import frozen_hash
from app.superexec import SERVERAPP_ENVIRONMENT
from app.tensorfile import WEIGHTS, Lazy
from app.tiny_base import ensure_tiny_base
from benchmarks.shapes import SHAPES

PACKAGE = "benchmarks.aggregation"
DECODED = 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
# SmolVLA's 450,046,176 values less those that are trained: what a checkpoint copies.
FROZEN_VALUES = 450_046_176 - DECODED // 4
SITES = (1, 2, 4, 16)
# Four different updates are enough to the ServerApp, and spare the stand-in's memory.
DIFFERENT = 4
# A run that takes longer has failed.
LIMIT_SECONDS = 900


def make_base(place: Path) -> Path:
    """A model directory of the real size: the tiny base's files around random bfloat16 weights."""
    import torch
    from safetensors.torch import save_file

    base = shutil.copytree(ensure_tiny_base(place / "models").parent, place / "model") / "base"
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    # As many frozen tensors as the real model has beside its 155.
    parts = torch.randn(FROZEN_VALUES, dtype=torch.bfloat16).chunk(345)
    frozen = {f"model.vlm_with_expert.vlm.{n:03d}": part.clone() for n, part in enumerate(parts)}
    save_file(tensors | frozen, base / WEIGHTS, metadata={"format": "pt"})
    return base


def make_updates(place: Path, count: int, codec: str, base: str, frozen: str) -> list[Path]:
    """Updates as large as a round of training makes them, drawn at random."""
    draw, paths = np.random.default_rng(0), []
    for number in range(count):
        tensors = (
            (name, draw.standard_normal(SHAPES[name], np.float32) * np.float32(1e-3))
            for name in sorted(SHAPES)
        )
        paths.append(place / f"update-{number:02d}")
        pack(tensors, kind="update", codec=codec, base=base, target=None, frozen=frozen).write(
            paths[-1]
        )
    return paths


def started(module: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A module of this package, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"{PACKAGE}.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """The JSON a process prints."""
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    return json.loads(out)


@contextlib.contextmanager
def superlink(place: Path, updates: list[Path], sites: int, held: str) -> Iterator[Path]:
    """The stand-in of the SuperLink, listening."""
    address = place / "superlink.socket"
    process = started("superlink", address, *updates, "--sites", sites, "--held", held)
    try:
        while not address.exists():
            if process.poll() is not None:
                raise RuntimeError("the stand-in of the SuperLink did not start")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()
        address.unlink(missing_ok=True)


def run(
    place: Path, base: Path, updates: list[Path], sites: int, held: str, **config: object
) -> dict[str, float]:
    """One run of the ServerApp: its peak, and the seconds of its training rounds."""
    runs = place / "runs"
    settings = {"model": str(base), "min-sites": sites, "rounds": 2, **config}
    try:
        with superlink(place, updates, sites, held) as address:
            result: dict[str, float] = answer(
                started(
                    "serverapp",
                    address,
                    json.dumps(settings),
                    VLAFLEET_RUNS=str(runs),
                    **SERVERAPP_ENVIRONMENT,
                )
            )
        rounds = [record for record in read_rounds(runs / "1") if record["round"]]
        for record in rounds:
            states = {site["train"]["state"] for site in record["sites"].values()}
            assert states == {"completed"}, states
        for phase in ("collect", "commit"):
            result[phase] = statistics.mean(record["seconds"][phase] for record in rounds)
        return result
    finally:
        shutil.rmtree(runs, ignore_errors=True)


def main() -> None:
    """Alternate the numbers of sites; print medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--place", type=Path, help="where 15 GB are free (default: TMPDIR)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        measure(Path(folder), options.codec, options.repeat)


def measure(place: Path, codec: str, repeat: int) -> None:
    """Both tables."""
    base = make_base(place)
    held = canonical_hash(Lazy(base / WEIGHTS, sorted(SHAPES)))
    updates = make_updates(place, max(SITES), codec, held, frozen_hash(base))
    # Sites that hold another model are sent the whole one, in float32, in round 0.
    kinds = {f"{sites}": (sites, held) for sites in SITES}
    kinds["2, sent the whole model"] = (2, "")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    combined: dict[tuple[int, str], list[dict[str, float]]] = {
        (sites, mean): [] for mean in ("none", "trimmed-mean", "median") for sites in SITES[1:]
    }
    for _ in range(repeat):
        for kind, (sites, holding) in kinds.items():
            runs[kind].append(run(place, base, updates[:DIFFERENT], sites, holding, codec=codec))
            print(f"{kind}: {runs[kind][-1]}", file=sys.stderr)
        for (sites, mean), found in combined.items():
            arguments = (place / "kept", *updates, "--sites", sites, "--robust", mean)
            found.append(answer(started("combine", *arguments)))
            print(f"{sites}, {mean}: {found[-1]}", file=sys.stderr)

    def middle(found: list[dict[str, float]], key: str) -> float:
        return statistics.median(each[key] for each in found)

    few = middle(runs["2"], "peak")
    print(f"before the run: {middle(runs['2'], 'before') / 1e6:.0f} MB\n")
    print(
        f"| sites | peak MB | min to max MB | in updates of {DECODED / 1e6:.1f} MB | in peaks of two "
        "sites | collect s a site | commit s |\n|---|---|---|---|---|---|---|"
    )
    for kind, found in runs.items():
        peaks = [each["peak"] / 1e6 for each in found]
        most = middle(found, "peak")
        print(
            f"| {kind} | {most / 1e6:.0f} | {min(peaks):.0f} to {max(peaks):.0f} "
            f"| {most / DECODED:.2f} | {most / few:.2f} "
            f"| {middle(found, 'collect') / kinds[kind][0]:.2f} | {middle(found, 'commit'):.1f} |"
        )
    print("\n| mean | sites | check and keep, s a site | combine, s a site |\n|---|---|---|---|")
    for (sites, mean), found in combined.items():
        print(
            f"| {mean} | {sites} | {middle(found, 'add') / sites:.2f} "
            f"| {middle(found, 'combine') / sites:.2f} |"
        )


if __name__ == "__main__":
    main()
