"""A site without containers: SuperNode and SuperExec as plain processes, kept running by a supervisor.

The two live and die together: a SuperExec that ends takes its ClientApp along, for whose reply the SuperNode would wait
for ever, and a SuperNode that ends has forgotten whose reply a ClientApp brings (measured on Flower 1.41).
"""

import contextlib
import fcntl
import logging
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NoReturn

from certs.contact import contact_file, seconds_since_contact
from certs.errors import FleetError, RunFailedError, StorageError
from certs.files import write_atomic
from certs.identity import Identity
from certs.parent import adopt_orphans, end_children
from certs.processes import Processes, last_line, trim
from certs.roles import Peer, Role
from supernode.site import Site, make_private

_log = logging.getLogger("vlafleet.site")

# Who runs the site: locked for as long as it does, and its process id.
_HOLDER: Final = "site.pid"
# The port of the SuperNode's Runtime API, for the next start; and of its metrics, for the lab's own Prometheus, too.
_PORT: Final = "port"
_METRICS_PORT: Final = "metrics-port"
# Before both are started again: doubled each time up to the longest, and back after this long without an end. Flower
# refuses a SuperNode for 60 s after a crash.
_PAUSE_S, _LONGEST_PAUSE_S, _SETTLED_S = 1.0, 30.0, 600.0
# Between two looks at the processes and at a signal.
_LOOK_S = 0.25
# Between two looks at the logs' sizes.
_TRIM_S = 60.0
# A look at the lock holds it for an instant; the supervisor must not take that for another one.
_LOCK_S = 2.0
# The supervisor holds its lock within a second; imports on a busy machine take longer.
_START_S = 60.0
# Both processes have 15 s to end, then they are killed.
_STOP_S = 45.0


def run(directory: Path) -> NoReturn:
    """Keep a site's processes running until SIGTERM or SIGINT; then end them in order, and exit with status 0.

    Raises ``StorageError`` when the site runs already, and what ``Site.load`` and ``Identity.load`` raise.
    """
    site = Site.load(directory)
    # What no restart would mend is said at once.
    peer = Identity.load(site.identity, Role.SITE).peer
    Identity.load(site.superexec, Role.SUPEREXEC)
    _hold(site.directory)
    _log.info("site %s: process %d, logs in %s", site.name, os.getpid(), site.logs)
    _Supervisor(site, peer).run()
    _log.info("site %s: stopped", site.name)
    sys.exit(0)


def start(site: Site) -> None:
    """Run a site in the background, where it stays when this process ends; do nothing when it runs.

    Also writes a systemd unit that does the same from the machine's start on. Raises ``RunFailedError`` with the
    supervisor's last line when it ends at once.
    """
    unit = write_unit(site)
    if running(site.directory):
        return
    make_private(site.logs)
    log = site.logs / "site.log"
    trim(log)
    with log.open("ab") as output:
        process = subprocess.Popen(
            _command(site),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=site.directory,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_S
    while _holder(site.directory) != process.pid:
        if process.poll() is not None:
            raise RunFailedError(f"site {site.name} did not start: {last_line(log)} ({log})")
        if time.monotonic() > deadline:
            process.terminate()
            raise RunFailedError(f"site {site.name} did not start within {_START_S:g} s ({log})")
        time.sleep(0.05)
    _log.info("site %s runs as process %d; to start it with the machine, see %s",
              *(site.name, process.pid, unit))  # fmt: skip


def stop(directory: Path) -> bool:
    """End a site's processes and return when they are gone; False when none ran.

    Raises ``RunFailedError`` when they do not end, ``StorageError`` when they are another user's.
    """
    deadline = time.monotonic() + _STOP_S
    told: int | None = None
    while (holder := _holder(directory)) is not None:
        # None yet: it took the lock this moment.
        if holder and holder != told:
            told = holder
            try:
                os.kill(holder, signal.SIGTERM)
            except PermissionError as error:
                raise StorageError(
                    f"the site in {directory} is run by another user (process {holder}); stop it as that user"
                ) from error
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise RunFailedError(
                f"the site in {directory} (process {holder}) did not end within {_STOP_S:g} s: "
                f"look at {directory / 'logs'}"
            )
        time.sleep(0.05)
    return told is not None


def running(directory: Path) -> bool:
    """Whether a supervisor runs the site."""
    return _holder(directory) is not None


class _Supervisor:
    """Both processes of a site, started again whenever one ends."""

    def __init__(self, site: Site, peer: Peer) -> None:
        self._directory = site.directory
        self._peer = peer
        self._processes = Processes(site.logs)
        self._trimmed = time.monotonic()
        self._stopping = False

    def run(self) -> None:
        """Return after a signal to stop, when every process is gone."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        adopt_orphans()
        pause = _PAUSE_S
        try:
            while not self._stopping:
                started = time.monotonic()
                try:
                    self._both()
                except FleetError as error:
                    self._end()
                    if time.monotonic() - started > _SETTLED_S:
                        pause = _PAUSE_S
                    # Jitter: the sites of a federation that was down do not all come back at once.
                    wait = pause * random.uniform(0.75, 1.25)  # noqa: S311
                    _log.warning("%s; starting again in %.1f s", error, wait)
                    self._sleep(wait)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
        finally:
            self._end()

    def _both(self) -> None:
        """Run both processes until a signal to stop; ``RunFailedError`` when one ends."""
        # Read anew: it may have joined again meanwhile.
        site = Site.load(self._directory)
        make_private(site.logs)
        port = _free_port(site.directory / _PORT)
        metrics = _free_port(site.directory / _METRICS_PORT)
        own = {"VLAFLEET_HOME": str(site.directory), "FLWR_HOME": str(site.directory / "flwr")}
        # The last SuperNode's contact is not this one's.
        contact_file(self._peer).unlink(missing_ok=True)
        self._processes.start(
            "supernode",
            *("supernode", "--identity", str(site.identity), "--port", str(port)),
            *("--superlink", site.superlink, "--enrolment", site.enrolment),
            *("--dataset", site.dataset, "--device", site.device),
            *("--metrics", f"127.0.0.1:{metrics}"),
            **own,
        )
        # A SuperNode that the SuperLink refuses needs no SuperExec, whose trainer takes 20 s to import its packages.
        while not self._stopping and seconds_since_contact(self._peer) is None:
            self._look()
        if self._stopping:
            return
        self._processes.start(
            "superexec",
            *("superexec", "--identity", str(site.superexec), "--address", f"localhost:{port}"),
            **own,
            **_hub(site),
        )
        while not self._stopping:
            self._look()

    def _look(self) -> None:
        self._processes.check()
        if time.monotonic() - self._trimmed > _TRIM_S:
            self._trimmed = time.monotonic()
            for name in (*self._processes.running, "site"):
                trim(self._processes.log(name))
        time.sleep(_LOOK_S)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < end:
            time.sleep(_LOOK_S)

    def _end(self) -> None:
        """End both, and kill what they leave: ClientApps, the trainer."""
        self._processes.stop()
        end_children()

    def _stop(self, *_: object) -> None:
        self._stopping = True


def _hub(site: Site) -> dict[str, str]:
    """What the Hugging Face libraries of a site's SuperExec are told."""
    tables = {"HF_DATASETS_CACHE": str(site.cache / "datasets")}
    return tables if site.dataset.startswith("hf:") else {**tables, "HF_HUB_OFFLINE": "1"}


def _command(site: Site) -> list[str]:
    command = ["site", "run", "--directory", str(site.directory)]
    return [sys.executable, "-m", "vlafleet", *command]


def _free_port(path: Path) -> int:
    """Return a port of loopback that is free, the one noted in a file where it is, and note it there."""
    try:
        last = int(path.read_text())
    except (OSError, ValueError):
        last = 0
    for wanted in (last, 0):
        with (
            contextlib.suppress(OSError, OverflowError),
            socket.create_server(("127.0.0.1", wanted)) as probe,
        ):
            port: int = probe.getsockname()[1]
            write_atomic(path, f"{port}\n".encode())
            return port
    raise RunFailedError("no port of 127.0.0.1 is free")


def _hold(directory: Path) -> None:
    """Be the one process that runs the site, until it ends: then, however that comes, the kernel frees the lock."""
    path = directory / _HOLDER
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holder = os.read(lock, 32).decode().strip()
                os.close(lock)
                raise StorageError(
                    f"the site in {directory} runs already (process {holder}): "
                    f"end it with 'vlafleet site stop --directory {directory}'"
                ) from error
            time.sleep(0.02)
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())


def _holder(directory: Path) -> int | None:
    """Return the process that runs the site, 0 while it has not said which; None when none does."""
    try:
        with (directory / _HOLDER).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0)
            return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{directory / _HOLDER} cannot be read: {error.strerror}") from error


def write_unit(site: Site) -> Path:
    """Write a unit for the user's systemd that runs the site; return its path."""
    # A lab may be of several federations, under one name.
    path = site.directory / f"vlafleet-{site.federation}-{site.name}.service"
    # The hub's own cache is outside the site's directory.
    hub = "ReadWritePaths=-%h/.cache/huggingface\n" if site.dataset.startswith("hf:") else ""
    write_atomic(
        path,
        _UNIT.format(
            name=site.name,
            federation=site.federation,
            path=shlex.quote(str(path)),
            place=shlex.quote(str(site.directory)),
            directory=_quoted(site.directory),
            # There a dollar would be a variable's.
            command=" ".join(_quoted(word).replace("$", "$$") for word in _command(site)),
            hub=hub,
        ).encode(),
    )
    return path


def _quoted(word: object) -> str:
    """Quote a word for a unit file (systemd.syntax(7))."""
    text = str(word).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text.replace("%", "%%")}"'


_UNIT: Final = """\
# The site {name} of the federation {federation}, from this machine's start on:
#   vlafleet site stop --directory {place}
#   systemctl --user enable --now {path}
#   loginctl enable-linger          # also while you are not logged in
# What it says: journalctl --user --unit vlafleet-{federation}-{name}
[Unit]
Description=vlafleet site {name} of {federation}

[Service]
ExecStart={command}
# It ends with status 0 when it was told to stop.
Restart=on-failure
RestartSec=30
# The supervisor ends its processes in order; what is left then is killed.
KillMode=mixed
TimeoutStopSec=45
# All it writes lies below the site's directory. The options that a GPU or torch's compiler needs open are not here.
PrivateUsers=yes
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={directory}
{hub}PrivateTmp=yes
ProtectControlGroups=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077

[Install]
WantedBy=default.target
"""
