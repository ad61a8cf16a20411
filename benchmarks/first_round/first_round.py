"""Seconds from a start to the first committed round, next to what importing lerobot costs on the same machine.

Flower starts a process for every message and each imports lerobot, so that import is the natural unit here: a ratio
moves when this project changes, an absolute time when the machine is busy. See README.md for how to run it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tests.docker.compose_project import ROOT, Project

IMPORT = "import lerobot.policies.smolvla.modeling_smolvla"
# A start that takes longer has failed.
LIMIT_SECONDS = 900.0


def reference() -> float:
    """Import lerobot's SmolVLA in a fresh process."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
    return time.monotonic() - started


def compose(environment: dict[str, str], without: set[str]) -> float:
    """``docker compose up`` until round 1's checkpoint is on disk; images and data are there."""
    project = Project("vlafleet-benchmark", environment)
    services = sorted(set(project.config()["services"]) - without)
    try:
        started = time.monotonic()
        project.output("up", "--detach", "--no-build", *services, timeout=LIMIT_SECONDS)
        found = ("exec", "-T", "superexec", "test", "-e", "/runs/latest/checkpoints/round-0001")
        while project.compose(*found).returncode != 0:
            if time.monotonic() - started > LIMIT_SECONDS:
                raise TimeoutError(project.output("logs", "--no-color", "--tail", "40", "run"))
            time.sleep(0.5)
        return time.monotonic() - started
    finally:
        project.compose("down", "--volumes", "--timeout", "10")


def demo() -> float:
    """``make demo`` from its start to its table, data cached: three rounds at two sites."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "vlafleet", "demo", "--port", "9600"]
        command += ["--directory", f"{place}/federation", "--runs", f"{place}/runs"]
        started = time.monotonic()
        subprocess.run(
            command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=LIMIT_SECONDS
        )
        return time.monotonic() - started


def main() -> None:
    """Alternate the measurements, print medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each kind")
    parser.add_argument(
        "--without", action="append", default=[], help="leave out this compose service"
    )
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for docker compose")
    options = parser.parse_args()
    environment = dict(setting.split("=", 1) for setting in options.env)
    kinds: dict[str, Callable[[], float]] = {
        "import of lerobot": reference,
        "compose up to first committed round": lambda: compose(environment, set(options.without)),
        "demo, three rounds": demo,
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.repeat):
        for kind, measure in kinds.items():
            seconds[kind].append(measure())
            print(f"{kind}: {seconds[kind][-1]:.1f} s", file=sys.stderr)
    unit = statistics.median(seconds["import of lerobot"])
    print("| what | median s | min to max s | in imports of lerobot |\n|---|---|---|---|")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(
            f"| {kind} | {median:.1f} | {min(values):.1f} to {max(values):.1f} | {median / unit:.1f} |"
        )
    print(json.dumps(seconds), file=sys.stderr)


if __name__ == "__main__":
    main()
