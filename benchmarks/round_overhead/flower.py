"""What a message costs beside the site's own work, in a real federation of one site: polling, processes, transport.

A message's seconds, from when the ServerApp pushed it until it pulled the reply, without what the site says it took to
get ready and to work. All of that is Flower's, but for some hundredths of a second in the ClientApp and the trainer.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from app.journal import read_rounds
from certs.server import bind
from superlink.control import run_request
from superlink.demo import federation
from tests.recorder import record


def main() -> None:
    """Print a line for each kind of message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["VLAFLEET_HOME"] = str(place / "home")
        data = record(place / "data", (30, 35, 40))
        with bind("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        settings = f"rounds={options.rounds} local-steps=3 batch-size=4 eval-batches=1 min-sites=1"
        runs = place / "runs"
        with federation(place, {"site-a": str(data)}, runs, port) as (control, processes):
            run_id = control.start(run_request(Path(), [settings]))
            while control.status(run_id).status != "finished":
                processes.check()
                time.sleep(1)
            control.require_completed(run_id, f"logs: {processes.logs}")
        records = read_rounds(runs / (runs / "latest").readlink())
    for kind in ("train", "evaluate"):
        # The first round of all loads the model.
        found = [one["sites"]["site-a"][kind] for one in records if one["round"] >= 2]
        own = [one["ready_seconds"] + one["work_seconds"] for one in found]
        rest = [one["seconds"] - ours for one, ours in zip(found, own, strict=True)]
        print(
            f"{kind}: {median(rest):.2f} ({min(rest):.2f} to {max(rest):.2f}) s beside "
            f"{median(own):.2f} ({min(own):.2f} to {max(own):.2f}) s of the site's, rounds 2 to {options.rounds}"
        )


if __name__ == "__main__":
    main()
