"""A site as plain processes: what is killed comes back, what is stopped is gone, and one supervisor at a time."""

import configparser
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from certs.errors import CertificateError, ConfigError, RunFailedError, StorageError
from certs.identity import Identity
from certs.roles import Role
from supernode import native
from supernode.site import Site
from tests.conftest import Vlafleet
from tests.federation import Running

# Far beyond what a start takes on a busy machine.
SECONDS = 120.0


def until[T](look: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + SECONDS
    while not (found := look()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def runs(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def descendants(pid: int) -> dict[int, str]:
    """Every process below one, with its command line."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if stat[0] != "Z":
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            found[child] = " ".join(words)
            todo.append(child)
    return found


def child(supervisor: int, command: str, other_than: int = 0) -> int:
    """The pid of a site's process, once there is one."""

    def look() -> int:
        for pid, words in descendants(supervisor).items():
            if f"vlafleet {command} --identity" in words and pid != other_than:
                return pid
        return 0

    return until(look, f"no {command} below {supervisor}")


@pytest.fixture
def site(superlink: Running, tmp_path: Path) -> Iterator[Site]:
    """A member's directory, as a join leaves it; whatever runs of it is ended."""
    directory = tmp_path / "a site"
    site = Site(
        directory,
        "test",
        "site-a",
        superlink.address,
        "localhost:9",
        str(tmp_path),
        "cpu",
        "native",
    )
    site.prepare()
    for role, target in ((Role.SITE, site.identity), (Role.SUPEREXEC, site.superexec)):
        shutil.copytree(superlink.identity(role, "site-a"), target, dirs_exist_ok=True)
    site.save()
    yield site
    native.stop(directory)


@pytest.mark.federation
def test_processes_end_with_a_supervisor_that_was_killed(site: Site) -> None:
    """Before the next test: Flower lets nobody in for 60 s after a SuperNode was killed."""
    native.start(site)
    supervisor = int((site.directory / "site.pid").read_text())
    supernode, superexec = child(supervisor, "supernode"), child(supervisor, "superexec")
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not any(map(runs, [supernode, superexec])), "processes outlive their supervisor")
    assert not native.running(site.directory)


@pytest.mark.federation
@pytest.mark.timeout(600)
def test_killed_processes_come_back_and_stopped_ones_are_gone(
    site: Site, vlafleet: Vlafleet
) -> None:
    # Left by a supervisor that was killed; its number is somebody else's now.
    (site.directory / "site.pid").write_text(f"{os.getpid()}\n")
    assert not native.running(site.directory)
    assert native.stop(site.directory) is False

    native.start(site)
    assert native.running(site.directory)
    supervisor = int((site.directory / "site.pid").read_text())
    supernode, superexec = child(supervisor, "supernode"), child(supervisor, "superexec")
    ports = [(site.directory / name).read_text() for name in ("port", "metrics-port")]
    trainer = until(
        lambda: [pid for pid, said in descendants(superexec).items() if "app.trainer" in said],
        "no trainer",
    )
    # It is the site's own directory that they write to.
    environment = Path(f"/proc/{superexec}/environ").read_bytes().split(b"\0")
    assert f"VLAFLEET_HOME={site.directory}".encode() in environment
    assert b"HF_HUB_OFFLINE=1" in environment

    # A Prometheus of the lab's own sees the SuperNode, and what its SuperExec reports.
    address = f"http://127.0.0.1:{ports[1].strip()}/metrics"
    reported = until(
        lambda: re.findall(r"^(vlafleet_trainer_up|vlafleet_trainer_restarts_total) (.*)$",
                           httpx.get(address).text, re.M),
        "no report",
    )  # fmt: skip
    assert ("vlafleet_trainer_restarts_total", "0.0") in reported

    # A second start changes nothing; a second supervisor is refused with a sentence.
    native.start(site)
    assert runs(supernode)
    second = vlafleet("site", "run", "--directory", site.directory)
    assert second.returncode == StorageError.exit_code
    assert f"runs already (process {supervisor})" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1

    os.kill(superexec, signal.SIGKILL)
    again = child(supervisor, "supernode", supernode), child(supervisor, "superexec", superexec)
    assert not any(map(runs, [supernode, superexec, *trainer]))
    # Its SuperLink was told, so it takes the site back at once, at the same ports.
    assert ports == [(site.directory / name).read_text() for name in ("port", "metrics-port")]
    log = (site.logs / "site.log").read_text()
    assert "superexec ended with exit code -9" in log

    os.kill(again[0], signal.SIGKILL)
    third = child(supervisor, "supernode", again[0])
    assert not any(map(runs, again))

    everything = [supervisor, third, *descendants(supervisor)]
    assert native.stop(site.directory) is True
    assert not any(map(runs, everything))
    assert not native.running(site.directory)
    assert native.stop(site.directory) is False


@pytest.mark.federation
def test_a_site_that_cannot_run_says_why(site: Site, vlafleet: Vlafleet) -> None:
    (site.superexec / "tls.crt").unlink()
    done = vlafleet("site", "run", "--directory", site.directory)
    assert done.returncode == CertificateError.exit_code
    with pytest.raises(RunFailedError, match=r"site-a did not start: vlafleet: .*tls\.crt"):
        native.start(site)
    assert not native.running(site.directory)
    empty = vlafleet("site", "run", "--directory", site.directory / "logs")
    assert empty.returncode == ConfigError.exit_code


class Ending:
    """Processes that end, after so many seconds each time, on a clock that only sleeping moves."""

    def __init__(self, lives: list[float]) -> None:
        self.lives, self.now, self.end = lives, 0.0, 0.0
        self.running: dict[str, None] = {}
        self.started: list[float] = []

    def start(self, *_: str, **__: str) -> None:
        if not self.lives:
            signal.raise_signal(signal.SIGTERM)
            return
        self.started.append(self.now)
        self.end = self.now + self.lives.pop(0)

    def check(self) -> None:
        if self.now >= self.end:
            raise RunFailedError("it ended")

    def log(self, _: str) -> Path:
        return Path(os.devnull)

    def stop(self) -> None:
        pass

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_pauses_grow_and_end_with_ten_minutes_of_health(
    pki: Path,
    identity: Callable[[Role, str], Identity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = Site(tmp_path, "test", "site-a", "localhost:9", "localhost:9", "/data", "cpu", "native")
    site.save()
    lives = [0.0] * 7 + [601.0, 0.0]
    processes = Ending(list(lives))
    monkeypatch.setattr(native, "Processes", lambda _: processes)
    monkeypatch.setattr(native, "end_children", lambda: None)
    monkeypatch.setattr(native, "adopt_orphans", lambda: None)
    monkeypatch.setattr(native, "time", processes)
    monkeypatch.setattr(random, "uniform", lambda *_: 1.0)
    handlers = {number: signal.getsignal(number) for number in (1, 2, 15)}
    try:
        native._Supervisor(site, identity(Role.SITE, "site-a").peer).run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    ended = [at + life for at, life in zip(processes.started, lives, strict=True)]
    pauses = [
        round(later - end) for later, end in zip(processes.started[1:], ended[:-1], strict=True)
    ]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 1]


def test_the_last_port_is_taken_again_while_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "port"
    first = native._free_port(path)
    assert native._free_port(path) == first
    with socket.create_server(("127.0.0.1", first)):
        other = native._free_port(path)
    assert other != first
    assert native._free_port(path) == other
    path.write_text("99999 or so")
    assert native._free_port(path) > 0


def test_a_lock_is_not_a_supervisor_once_its_holder_ended(tmp_path: Path) -> None:
    hold = (
        "import sys, pathlib; from supernode.native import _hold\n"
        "_hold(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout
        holder.stdout.readline()
        assert native.running(tmp_path)
        assert native._holder(tmp_path) == holder.pid
        holder.kill()
        holder.wait()
    assert not native.running(tmp_path)
    assert (tmp_path / "site.pid").read_text() == f"{holder.pid}\n"


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    directory = tmp_path / 'of "100 %" $HOME'
    site = Site(directory, "test", "lab-7", "host:9092", "host:9093", "/data", "cpu", "native")
    path = native.write_unit(site)
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    service = parser["Service"]
    assert service["NoNewPrivileges"] == service["PrivateTmp"] == "yes"
    assert service["ProtectSystem"] == "strict"
    # A dollar is a variable's in the command alone.
    assert service["ReadWritePaths"].endswith(r'of \"100 %%\" $HOME"')
    assert service["ExecStart"].endswith(r'of \"100 %%\" $$HOME"')
    assert ".cache" not in path.read_text()
    if shutil.which("systemd-analyze"):
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--user", path],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )
        assert path.name not in verified.stderr, verified.stderr
        assert verified.returncode == 0, verified.stderr
    hub = native.write_unit(replace(site, dataset="hf:owner/name"))
    assert "ReadWritePaths=-%h/.cache/huggingface\n" in hub.read_text()
