"""Seconds from ``site invite`` to the site online, and from ``site revoke`` to its first refusal; see README.md.

The unit beside the seconds is what the same site's SuperNode takes from its start to online with an identity that is
already there: Flower's own part, which no onboarding can be faster than.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from certs.identity import identity_directory
from certs.roles import Role
from superlink.demo import federation
from tests.recorder import record

# A step that takes longer has failed.
LIMIT_SECONDS = 300.0


def vlafleet(operator: Path, enrolment: str, *arguments: str) -> str:
    """Run a command; what it printed."""
    environment = {"VLAFLEET_IDENTITY": str(operator), "VLAFLEET_ENROLMENT": enrolment}
    done = subprocess.run(
        [sys.executable, "-m", "vlafleet", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stdout}{done.stderr}")
    return done.stdout


def measured(repeat: int, directory: Path, port: int) -> dict[str, list[float]]:
    """The seconds of each step, for sites that join, leave and are revoked one after the other."""
    data = {name: str(record(directory / "data" / name)) for name in ("site-a", "site-j")}
    seconds: dict[str, list[float]] = {
        "invite and join": [],
        "stop and start again": [],
        "revoke": [],
        "first refusal": [],
    }
    home, audit = directory / "federation", directory / "federation" / "state" / "audit.jsonl"
    datasets = {"site-a": data["site-a"]}
    with federation(home, datasets, directory / "runs", port, enrolment=True) as (control, _):
        operator = identity_directory(home / "pki", Role.OPERATOR, "admin")
        enrolment = f"localhost:{port + 2}"

        def timed(what: str, action: Callable[[], object]) -> None:
            started = time.monotonic()
            action()
            seconds[what].append(time.monotonic() - started)
            print(f"{what}: {seconds[what][-1]:.1f} s", file=sys.stderr)

        running: list[subprocess.Popen[bytes]] = []
        for number in range(repeat):
            name = f"site-{number}"
            place = ["--directory", str(directory / name)]

            def join(name: str = name, place: list[str] = place) -> None:
                invitation = vlafleet(operator, enrolment, "site", "invite", name).strip()
                arguments = ["--dataset", data["site-j"], "--native", *place]
                vlafleet(operator, enrolment, "site", "join", invitation, *arguments)

            def again(name: str = name, place: list[str] = place) -> None:
                started = [sys.executable, "-m", "vlafleet", "site", "run", *place]
                process = subprocess.Popen(started, stdout=subprocess.DEVNULL)
                control.wait_online([name], LIMIT_SECONDS)
                running.append(process)

            timed("invite and join", join)
            vlafleet(operator, enrolment, "site", "stop", *place)
            timed("stop and start again", again)
            before = time.time()
            timed("revoke", lambda name=name: vlafleet(operator, enrolment, "site", "revoke", name))
            while not (refused := refusals(audit, before)):
                time.sleep(0.1)
            seconds["first refusal"].append(refused[0] - before)
            vlafleet(operator, enrolment, "site", "stop", *place)
            running.pop().wait()
    return seconds


def refusals(audit: Path, since: float) -> list[float]:
    """When the SuperLink refused requests or handshakes."""
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    times = [
        datetime.fromisoformat(line["time"]).timestamp()
        for line in lines
        if line["event"].endswith("-refused")
    ]
    return [moment for moment in times if moment > since]


def main() -> None:
    """Print medians, spreads and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="sites that join")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        seconds = measured(options.repeat, Path(place), port)
    unit = statistics.median(seconds["stop and start again"])
    print("| what | median s | min to max s | in starts of a member |\n|---|---|---|---|")
    for kind, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"| {kind} | {median:.1f} | {spread} | {median / unit:.1f} |")
    print(json.dumps(seconds), file=sys.stderr)


if __name__ == "__main__":
    main()
