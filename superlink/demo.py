"""A whole federation on this machine as plain processes: what ``make demo`` runs.

The processes are the real ones, each the ``vlafleet`` command with its own identity. They end with this one: in order
at the end or on Ctrl-C, and by the kernel should it be killed.
"""

import contextlib
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import typer

from certs.errors import FleetError
from certs.health import check
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    identity_directory,
)
from certs.logs import entry
from certs.processes import Processes
from certs.roles import ENROLMENT_NAME, EXPORTER_NAME, SUPERLINK_NAME, Role
from certs.server import bind
from superlink.control import Control, run_request

SITES = ("site-a", "site-b")
# Importing Flower takes 3 s on an idle core; five processes share two cores.
_START_SECONDS = 120.0


@contextlib.contextmanager
def federation(
    directory: Path,
    datasets: dict[str, str],
    runs: Path,
    port: int,
    uplinks: Mapping[str, str] | None = None,
    *,
    enrolment: bool = False,
    watched: bool = False,
    site_lifetime: str = "",
) -> Iterator[tuple[Control, Processes]]:
    """Run a SuperLink, its SuperExec and a SuperNode with SuperExec per site; yield when all are online.

    ``directory`` keeps identities, logs and Flower's state. ``datasets`` maps a site to its dataset URI. The SuperLink
    listens on ``port`` of loopback, the SuperNodes on the ports above. ``uplinks`` maps a site to the address
    (``host:port``) at which it finds the SuperLink, where that is another. With ``enrolment`` an enrolment service
    listens on the port above the SuperNodes', signs sites' certificates for ``site_lifetime`` (``24s``; empty: as long
    as by default), and every process renews its certificate there. When ``watched``, an exporter listens on the next
    port.
    """
    names = [SUPERLINK_NAME, *datasets]
    names += [ENROLMENT_NAME] if enrolment else []
    names += [EXPORTER_NAME] if watched else []
    ports = {name: port + i for i, name in enumerate(names)}
    for number in ports.values():
        bind("127.0.0.1", number).close()
    pki, logs, state = directory / "pki", directory / "logs", directory / "state"
    for _ in ensure_federation(pki, "demo", list(datasets)):
        pass
    # The runs of an earlier demo are kept under runs/; Flower's records of them, and of a SuperNode that was killed
    # and may not come back for 60 s, are not.
    for kept in (state, logs):
        shutil.rmtree(kept, ignore_errors=True)
    logs.mkdir(parents=True)
    address = f"localhost:{port}"
    processes = Processes(logs)
    renewing = ["--enrolment", f"localhost:{ports[ENROLMENT_NAME]}"] if enrolment else []

    def identity(role: Role, name: str) -> str:
        return str(identity_directory(pki, role, name))

    def superexec(name: str) -> None:
        processes.start(
            f"superexec-{name}",
            *("superexec", "--identity", identity(Role.SUPEREXEC, name)),
            *("--address", f"localhost:{ports[name]}"),
            # A site's reaches nothing but its SuperNode, which renews for it.
            *(renewing if name == SUPERLINK_NAME else []),
            # Two SuperExecs that unpack the same bundle into one place would race.
            FLWR_HOME=str(directory / "flwr" / name),
            VLAFLEET_RUNS=str(runs),
        )

    try:
        superlink = identity(Role.SUPERLINK, SUPERLINK_NAME)
        processes.start(
            "superlink",
            *("superlink", "--identity", superlink, "--state", str(state), "--port", str(port)),
            *renewing,
        )
        superexec(SUPERLINK_NAME)
        wait_for_superlink(processes, Path(superlink), address)
        if enrolment:
            own = identity(Role.ENROLMENT, ENROLMENT_NAME)
            processes.start(
                "enrolment",
                *("enrolment", "--identity", own, "--authority", str(authority_directory(pki))),
                *("--state", str(directory / "enrolment"), "--superlink", address),
                *("--port", str(ports[ENROLMENT_NAME])),
                *(["--site-lifetime", site_lifetime] if site_lifetime else []),
            )
            wait_for_superlink(processes, Path(own), f"localhost:{ports[ENROLMENT_NAME]}")
        if watched:
            own = identity(Role.EXPORTER, EXPORTER_NAME)
            processes.start(
                "exporter",
                *("exporter", "--identity", own, "--superlink", address),
                *("--runs", str(runs), "--port", str(ports[EXPORTER_NAME])),
                *renewing,
            )
            wait_for_superlink(processes, Path(own), f"localhost:{ports[EXPORTER_NAME]}")
        operator = Identity.load(identity_directory(pki, Role.OPERATOR, "admin"), Role.OPERATOR)
        with Control.connect(operator, address) as control:
            for site, dataset in datasets.items():
                control.register(site, Path(identity(Role.SITE, site)) / "node.pub")
                processes.start(
                    f"supernode-{site}",
                    *("supernode", "--identity", identity(Role.SITE, site)),
                    *("--superlink", (uplinks or {}).get(site, address)),
                    *("--port", str(ports[site]), "--dataset", dataset),
                    *renewing,
                )
                superexec(site)
            control.wait_online(list(datasets), _START_SECONDS)
            yield control, processes
    finally:
        processes.stop()


def demo(directory: Path, data: Path, runs: Path, port: int, run_config: str) -> None:
    """Make the demo data, run a federation of two sites, and print the closing table."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # What can be refused is refused before a minute is spent on the data.
    bind("127.0.0.1", port).close()
    request = run_request(Path(), [run_config] if run_config else [])
    directory.mkdir(parents=True, exist_ok=True)
    sites = [argument for site in SITES for argument in ("--site", site)]
    vlafleet("data", "make", str(data), *sites)
    datasets = {site: str((data / site).absolute()) for site in SITES}
    typer.echo("Starting SuperLink, SuperNodes and SuperExecs ...")
    # The enrolment service takes a second: other sites may join while the demo runs.
    with federation(directory, datasets, runs.absolute(), port, enrolment=True, watched=True) as (
        control,
        processes,
    ):
        typer.echo(f"{' and '.join(SITES)} are online, over mutual TLS; logs: {processes.logs}")
        # The last of the ports: SuperLink, sites, enrolment service, exporter.
        admin = identity_directory(directory / "pki", Role.OPERATOR, "admin")
        typer.echo(
            f"Watch them: vlafleet watch --identity {admin} --exporter localhost:{port + len(SITES) + 2}"
        )
        run_id = control.start(request)
        try:
            _follow(control, processes, run_id)
        except KeyboardInterrupt:
            with contextlib.suppress(FleetError):
                control.stop(run_id)
            raise
        control.require_completed(run_id, f"logs: {processes.logs}")
    report_latest(runs)


def report_latest(runs: Path) -> None:
    """Print the table of the run that was written last: a resumed run keeps its directory."""
    vlafleet("report", str(runs / (runs / "latest").readlink()))


def _follow(control: Control, processes: Processes, run_id: int) -> None:
    """Print the ServerApp's log, and between its lines how far each site's training has come."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        try:
            for text in control.follow(run_id):
                for line in text.splitlines():
                    lines.put(line)
        except FleetError as error:
            lines.put(str(error))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    with contextlib.ExitStack() as stack:
        sites = {
            site: stack.enter_context((processes.logs / f"superexec-{site}.log").open())
            for site in SITES
        }
        while True:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.5)
                if line is None:
                    return
                if said := of_the_run(line):
                    typer.echo(said)
            for site, log in sites.items():
                if progress := _last_progress(log):
                    typer.echo(f"  {site}: {progress}")
            processes.check()


def of_the_run(line: str) -> str | None:
    """Return what the ServerApp says, without Flower's own lines and level columns; warnings and errors whole."""
    line = typer.unstyle(line)  # Flower colours its level column
    level, said = entry(line) or _columns(line)
    if level == "INFO":
        return said if said.startswith(("run ", "round ", "describe", "waiting ")) else None
    return f"{level}: {said}" if level in {"WARNING", "ERROR"} else None


def _columns(line: str) -> tuple[str, str]:
    level, _, said = line.partition(" :")
    return level.strip(), said.strip()


def _last_progress(log: IO[str]) -> str | None:
    """Return the newest progress of a ClientApp since the last look (``round 1/3 train: step 12/30, loss 2.1``)."""
    lines = ((entry(line) or ("", line))[1] for line in log)
    found = [line[line.index("round ") :].strip() for line in lines if "round " in line]
    return found[-1] if found else None


def wait_for_superlink(processes: Processes, identity: Path, address: str) -> None:
    """Return once the SuperLink, the enrolment service or the exporter answers its own probe.

    Raises ``FleetError`` when a process ends or it takes too long.
    """
    deadline = time.monotonic() + _START_SECONDS
    while True:
        processes.check()
        try:
            check(identity, address)
        except FleetError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def vlafleet(*arguments: str) -> None:
    """Run a ``vlafleet`` command in the foreground; end with its exit code when it fails."""
    done = subprocess.run([sys.executable, "-m", "vlafleet", *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
