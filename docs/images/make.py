"""Make the README's pictures of a real run: watch.svg while a site is out, report.png once it is over.

    .venv/bin/python docs/images/make.py SCRATCH [--port PORT]

runs a federation of two sites in the directory SCRATCH, ends one's SuperNode in mid-run, and lets it come back. Needs
chromium; takes three minutes on two cores.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from app.report import write_report
from app.screen import Screen
from app.watch import fetch
from certs.identity import Identity, identity_directory
from certs.roles import Role
from superlink.control import run_request
from superlink.demo import SITES, federation, vlafleet

HERE = Path(__file__).parent
COLUMNS = 100
# The page's head, its pictures, and the first tables.
PAGE = (1280, 1435)
OUT = "supernode-site-b"
# Away for long enough to be missed in a round: 'grace' is how long a site that went may take to be back.
SETTINGS = ["rounds=6 grace=3 local-steps=60"]
_DEADLINE_SECONDS = 600

Document = dict[str, Any]


def main() -> None:
    """Run the federation and take both pictures."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("scratch", type=Path)
    arguments.add_argument("--port", type=int, default=9392)
    given = arguments.parse_args()
    data, runs = given.scratch / "data", given.scratch / "runs"
    vlafleet("data", "make", str(data), *(word for site in SITES for word in ("--site", site)))
    datasets = {site: str((data / site).absolute()) for site in SITES}
    # Beside the SuperLink's port come the sites', the enrolment service's and the exporter's.
    exporter = f"localhost:{given.port + len(SITES) + 2}"
    with federation(
        given.scratch, datasets, runs.absolute(), given.port, enrolment=True, watched=True
    ) as (control, processes):
        operator = Identity.load(
            identity_directory(given.scratch / "pki", Role.OPERATOR, "admin"), Role.OPERATOR
        )

        def wait(condition: Callable[[Document], bool]) -> Document:
            deadline = time.monotonic() + _DEADLINE_SECONDS
            while time.monotonic() < deadline:
                document = fetch(operator, exporter)
                if document["run"] and condition(document):
                    return document
                time.sleep(0.2)
            sys.exit(f"waited in vain; logs: {processes.logs}")

        run_id = control.start(run_request(Path(), SETTINGS))
        wait(lambda seen: seen["run"]["round"] == 3 and seen["run"]["phase"] == "collect")
        site = processes.running[OUT]
        site.terminate()
        site.wait()
        # The round has ended without it, and the other site works on the next one.
        watch(wait(lambda seen: seen["run"]["round"] == 4 and _at_work(seen)))
        processes.start(OUT, *site.args[3:])  # type: ignore[index]
        for _ in control.follow(run_id):
            pass
        control.require_completed(run_id, f"logs: {processes.logs}")
    report(write_report(runs / str(run_id)))


def _at_work(document: Document) -> bool:
    """Whether a site has trained for a moment."""
    return any(
        one["doing"] and document["time"] - one["doing"]["since"] > 3 for one in document["sites"]
    )


def watch(document: Document) -> None:
    """Write what ``vlafleet watch`` shows of a document as watch.svg."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, legacy_windows=False
    )
    console.print(Screen(document, document["time"]))
    svg = console.export_svg(title="vlafleet watch", unique_id="watch")
    # Nothing is fetched: the reader's own fixed-width font does.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (HERE / "watch.svg").write_text(svg.replace("Fira Code", "monospace"), encoding="utf-8")


def report(page: Path) -> None:
    """Take report.png of a run's page."""
    command = ["chromium", "--headless", "--hide-scrollbars", "--disable-gpu"]
    # Root's chromium has no sandbox; the page is ours and holds no script.
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    command += [f"--window-size={PAGE[0]},{PAGE[1]}", f"--screenshot={HERE / 'report.png'}"]
    # Without a desktop it misses many a service, and says so.
    subprocess.run([*command, page.absolute().as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
