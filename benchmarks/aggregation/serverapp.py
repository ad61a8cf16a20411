"""One whole run of the ServerApp against the stand-in of the SuperLink, and the most memory it held."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, cast

from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from app import server_app
from app.config import RunConfig
from benchmarks.aggregation.superlink import RuntimeClient


def peak() -> int:
    """The most bytes of memory this process has held (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel names no VmHWM")


def main() -> None:
    """Run the config given as JSON; prints the peak before the run and in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("config", type=json.loads)
    options = parser.parse_args()
    # What Flower sets when it starts a ServerApp.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    grid = HttpGrid(token="none")  # noqa: S106 - nobody asks for it
    grid.set_run(Run.create_empty(1))
    grid._client = cast(Any, RuntimeClient(options.address))
    before = peak()
    server_app.Run(grid, "1", RunConfig.parse(options.config)).execute()
    json.dump({"before": before, "peak": peak()}, sys.stdout)


if __name__ == "__main__":
    main()
