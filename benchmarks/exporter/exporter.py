"""What a scrape of the exporter takes with many sites and rounds, how soon it is back, what it holds; see README.md.

Each size runs in a process of its own behind real mutual TLS. The unit is ``GET /health`` over the same connection:
TLS, HTTP and the guard, without what is scraped.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from certs.contexts import client_context
from certs.identity import Identity, ensure_federation, identity_directory
from certs.roles import Role
from tests.records import evaluated, record, run, trained

START_SECONDS = 120.0
MACHINE = {
    "cause": None,
    "samples_per_second": 31.5,
    "data_wait": 0.04,
    "gpu_memory_bytes": 9_000_000_000,
    "gpu_memory_total_bytes": 24_000_000_000,
    "gpu_utilization": 0.87,
    "disk_free_bytes": 90_000_000_000,
    "disk_size_bytes": 500_000_000_000,
    "trainer_restarts": 1,
}


def line(number: int, sites: int, noise: random.Random) -> str:
    """A round's record as the ServerApp writes it, with every site measured."""
    names = [f"site-{site}" for site in range(sites)]
    losses = {name: 3.0 / (number + 1) + noise.random() for name in names}
    one = record(number, losses)
    for name, entries in one["sites"].items():
        entries["evaluate"] = evaluated(losses[name])
        if number:
            entries["train"] = trained(loss=losses[name] + noise.random(), **MACHINE)
    one["ended_at"] = "2026-01-01T00:01:00+00:00"
    one["aggregate"]["seconds"] = 2.5
    return json.dumps({"schema": 2, **one}) + "\n"


def write(root: Path, sites: int, rounds: int) -> Path:
    """Write a run that goes on; its directory."""
    root.mkdir()
    names = [f"site-{site}" for site in range(sites)]
    directory = run(root, [record(0, dict.fromkeys(names, 3.0))], rounds=2 * rounds)
    noise = random.Random(0)  # noqa: S311
    with (directory / "rounds.jsonl").open("w") as file:
        for number in range(rounds + 1):
            file.write(line(number, sites, noise))
    progress(directory, names, rounds + 1)
    return directory


def progress(directory: Path, names: list[str], number: int) -> None:
    """Say, as the ServerApp does, that the sites train."""
    told = {"kind": "train", "state": "working", "reason": None, "since": time.time()}
    document = {
        "schema": 1,
        "run": directory.name,
        "round": number,
        "rounds": 2 * number,
        "phase": "collect",
        "since": time.time(),
        "sites": dict.fromkeys(names, told),
    }
    work = directory / ".progress.json.tmp"
    work.write_text(json.dumps(document))
    work.replace(directory / "progress.json")


class Exporter:
    """A running exporter and a client of its."""

    def __init__(self, pki: Path, runs: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        monitor = Identity.load(identity_directory(pki, Role.MONITOR, "prometheus"), Role.MONITOR)
        context = client_context(monitor, ("bench", Role.EXPORTER, "exporter"))
        self.url = f"https://localhost:{port}"
        self.client = httpx.Client(base_url=self.url, verify=context, timeout=30, trust_env=False)
        own = identity_directory(pki, Role.EXPORTER, "exporter")
        started = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vlafleet", "exporter", "--identity", str(own)),
                *("--superlink", "localhost:1", "--runs", str(runs), "--port", str(port)),
            ],
            stderr=subprocess.DEVNULL,
        )
        while True:
            try:
                self.client.get("/health").raise_for_status()
                break
            except httpx.TransportError:
                if time.monotonic() - started > START_SECONDS:
                    raise
                time.sleep(0.02)
        self.start_seconds = time.monotonic() - started

    def timed(
        self, path: str, times: int, before: Callable[[int], None] | None = None
    ) -> list[float]:
        """Milliseconds of each GET, with ``before`` done before each, not timed."""
        taken = []
        for number in range(times):
            if before is not None:
                before(number)
            started = time.perf_counter()
            self.client.get(path).raise_for_status()
            taken.append(1000 * (time.perf_counter() - started))
        return taken

    def processor(self) -> float:
        """Processor seconds of the exporter since its start."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> tuple[float, float]:
        """Resident now and at most, MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = dict(each.split(":", 1) for each in status.splitlines() if ":" in each)
        now, most = (int(found[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
        return now, most

    def stop(self) -> None:
        """End it."""
        self.client.close()
        self.process.terminate()
        self.process.wait(20)


def series(text: str) -> tuple[int, int]:
    """How many series there are, and how many of them name a site."""
    samples = [
        sample for family in text_string_to_metric_families(text) for sample in family.samples
    ]
    counted = Counter("site" in sample.labels for sample in samples)
    return counted[True] + counted[False], counted[True]


def measured(place: Path, pki: Path, sites: int, rounds: int, times: int) -> None:
    """Print the rows of one size."""
    runs = place / f"{sites}-{rounds}"
    directory = write(runs, sites, rounds)
    size = (directory / "rounds.jsonl").stat().st_size
    starts, spent = [], []
    for _ in range(3):
        exporter = Exporter(pki, runs)
        starts.append(exporter.start_seconds)
        spent.append(exporter.processor())
        if len(starts) < 3:
            exporter.stop()
    try:
        marks = [exporter.processor()]
        health = exporter.timed("/health", times)
        marks.append(exporter.processor())
        quiet = exporter.timed("/metrics", times)
        marks.append(exporter.processor())
        noise = random.Random(1)  # noqa: S311
        names = [f"site-{site}" for site in range(sites)]
        rows = directory / "rounds.jsonl"
        appended = rounds

        def goes_on(number: int) -> None:
            """Every tenth scrape a round ends, before each a site does; the scrapes drift over the looks."""
            nonlocal appended
            if number % 10 == 0:
                appended += 1
                with rows.open("a") as file:
                    file.write(line(appended, sites, noise))
            progress(directory, names, appended + 1)
            time.sleep(0.15)

        busy = exporter.timed("/metrics", times, goes_on)
        marks.append(exporter.processor())
        text = exporter.client.get("/metrics").text
        now, most = exporter.memory()
    finally:
        exporter.stop()
    unit = statistics.median(health)
    every, of_sites = series(text)
    print(
        f"{sites} sites, {rounds} rounds: journal {size / 1e6:.1f} MB, text {len(text) / 1e3:.0f} kB, "
        f"{every} series ({every - of_sites} and {of_sites / sites:g} a site), start "
        f"{statistics.median(starts):.1f} s ({min(starts):.1f} to {max(starts):.1f}), of them "
        f"{statistics.median(spent):.1f} of the processor, "
        f"memory {now:.0f} MB, at most {most:.0f} MB"
    )
    print("| what | median ms | p99 ms | max ms | in /health | processor ms |")
    print("|---|---|---|---|---|---|")
    kinds = {"health": health, "quiet": quiet, "during rounds": busy}
    for (what, taken), begun, over in zip(kinds.items(), marks, marks[1:], strict=False):
        ordered = sorted(taken)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
        median = statistics.median(taken)
        print(
            f"| {what} | {median:.1f} | {p99:.1f} | {ordered[-1]:.1f} | {median / unit:.1f} "
            f"| {1000 * (over - begun) / times:.1f} |"
        )


def main() -> None:
    """Print, for a small federation and for a large one, medians, tails and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=300, help="scrapes of each kind")
    parser.add_argument("--size", nargs=2, type=int, action="append", metavar=("SITES", "ROUNDS"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for _ in ensure_federation(place / "pki", "bench", ["site-0"]):
            pass
        for sites, rounds in options.size or [(2, 10), (100, 1000)]:
            measured(place, place / "pki", sites, rounds, options.repeat)


if __name__ == "__main__":
    main()
