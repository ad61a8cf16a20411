"""'vlafleet status' and 'watch' ask a real exporter over mutual TLS, and say what is wrong in a sentence."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from app.status import PATH
from app.watch import Watched, fetch
from certs.errors import ConnectionRefusedByFleetError
from certs.guard import allow
from certs.identity import Identity, identity_directory
from certs.processes import Processes
from certs.roles import Role
from superlink.demo import wait_for_superlink
from tests.clock import Clock
from tests.conftest import Vlafleet
from tests.endpoints import listening
from tests.records import record, run
from tests.serving import serving

Named = Callable[[Role, str], Identity]

LOSSES = {"site-a": 2.0, "site-b": 3.0}
DOCUMENT: dict[str, Any] = {"time": 1000.0, "run": None, "sites": [], "rounds": [], "federation": "test",
            "superlink": "online", "unreadable": 0}  # fmt: skip


class Exporter:
    """A real exporter of the runs in ``runs``; nothing is where it looks for its SuperLink."""

    def __init__(self, pki: Path, directory: Path, port: int, superlink: int) -> None:
        self.identity = identity_directory(pki, Role.EXPORTER, "exporter")
        self.runs, self.port = directory / "runs", port
        self.address = f"localhost:{port}"
        self._arguments = [
            *("exporter", "--identity", str(self.identity), "--runs", str(self.runs)),
            *("--superlink", f"localhost:{superlink}", "--port", str(port)),
        ]
        self._processes = Processes(directory)

    def start(self) -> None:
        self._processes.start("exporter", *self._arguments)
        wait_for_superlink(self._processes, self.identity, self.address)

    def stop(self) -> None:
        self._processes.stop()


@pytest.fixture
def exporter(pki: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Exporter]:
    started = Exporter(pki, tmp_path, free_port(), free_port())
    started.start()
    yield started
    started.stop()


@pytest.fixture
def operator(pki: Path) -> Path:
    return identity_directory(pki, Role.OPERATOR, "admin")


def test_status_of_a_run(exporter: Exporter, operator: Path, vlafleet: Vlafleet) -> None:
    environment = {**os.environ, "VLAFLEET_IDENTITY": str(operator), "COLUMNS": "80",
                   "VLAFLEET_EXPORTER": exporter.address}  # fmt: skip
    none = vlafleet("status", env=environment)
    assert none.returncode == 16
    assert none.stdout.startswith("test  SuperLink unreachable  0 sites")
    assert none.stderr.startswith(
        f"vlafleet: the exporter at {exporter.address} knows of no run yet: start one with 'vlafleet run'"
    )
    run(exporter.runs, [record(0, LOSSES)], rounds=4)
    deadline = time.monotonic() + 60
    while (done := vlafleet("status", env=environment)).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "run 17  lerobot/smolvla_base  round 0 of 4" in done.stdout
    assert re.search(r"^site-b  unknown +- +0 completed +3\.000", done.stdout, re.MULTILINE)
    # Not a terminal: no colour, and nothing wider than it was asked for.
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    told = json.loads(vlafleet("status", "--json", env=environment).stdout)
    assert (told["run"]["base_loss"], told["superlink"]) == (2.5, "unreachable")


def test_who_may_not_ask(exporter: Exporter, pki: Path, vlafleet: Vlafleet) -> None:
    site = identity_directory(pki, Role.SITE, "site-a")
    for command in ("status", "watch"):
        done = vlafleet(command, "--identity", site, "--exporter", exporter.address)
        assert done.returncode == 10
        assert "this command needs one of role operator" in done.stderr
    # The exporter does not take its word for it.
    with pytest.raises(
        ConnectionRefusedByFleetError,
        match=r"^the exporter at .* refuses spiffe://test/site/site-a",
    ):
        fetch(Identity.load(site, Role.SITE), exporter.address)


@pytest.mark.parametrize("command", ["status", "watch"])
def test_no_exporter_is_a_sentence(
    command: str, operator: Path, vlafleet: Vlafleet, free_port: Callable[[], int]
) -> None:
    address = f"localhost:{free_port()}"
    done = vlafleet(command, "--identity", operator, "--exporter", address)
    assert (done.returncode, done.stdout) == (15, "")
    assert done.stderr.startswith(f"vlafleet: no exporter answers at {address} (")
    assert done.stderr.count("\n") == 1
    done = vlafleet(command, "--identity", operator, "--exporter", "localhost")
    assert (done.returncode, done.stdout) == (13, "")
    assert "'localhost' is no address" in done.stderr


def test_another_server_is_not_taken_for_the_exporter(identity: Named) -> None:
    with (
        serving(identity(Role.SUPERLINK, "superlink")) as running,
        pytest.raises(ConnectionRefusedByFleetError, match="is not this federation's exporter"),
    ):
        fetch(identity(Role.OPERATOR, "admin"), f"localhost:{running.port}")


def test_a_server_without_tls_is_no_exporter(identity: Named) -> None:
    def greet(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.close()

    with (
        listening(greet) as port,
        pytest.raises(ConnectionRefusedByFleetError, match=r"^no exporter"),
    ):
        fetch(identity(Role.OPERATOR, "admin"), f"localhost:{port}")


@pytest.mark.parametrize(
    ("status", "body"),
    [(503, b"the runs cannot be read"), (200, b"<html>"), (200, b"[]"), (200, b'{"time": 1}')],
)
def test_an_answer_that_is_no_status(identity: Named, status: int, body: bytes) -> None:
    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    rules: Any = {PATH: (allow(lambda peer: peer.role is Role.OPERATOR), answer)}
    with serving(identity(Role.EXPORTER, "exporter"), rules=rules) as running:
        address = f"localhost:{running.port}"
        with pytest.raises(ConnectionRefusedByFleetError, match=f"answers {status}, and not with"):
            fetch(identity(Role.OPERATOR, "admin"), address)


def test_a_lost_exporter_is_said_until_it_is_back() -> None:
    clock, answers = Clock(5000.0), [DOCUMENT]

    def ask() -> dict[str, Any]:
        if not answers:
            raise ConnectionRefusedByFleetError("no exporter answers")
        return answers.pop()

    watched = Watched(ask, clock)
    assert (watched.screen().now, watched.screen().lost) == (1000.0, None)
    clock.now += 2
    watched.look()
    clock.now += 2
    watched.look()
    clock.now += 1
    # The exporter's clock goes on, and its silence began with the first look that failed.
    assert watched.screen().now == 1005.0
    assert watched.screen().lost == (
        "No answer for 3 s, what is below is from before: no exporter answers"
    )
    answers.append({**DOCUMENT, "time": 1006.0})
    watched.look()
    assert (watched.screen().now, watched.screen().lost) == (1006.0, None)
    # What fails at once is nothing to wait for.
    with pytest.raises(ConnectionRefusedByFleetError):
        Watched(ask, clock)


class Terminal:
    """A terminal, and all that was written to it."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.process, self.written = process, ""
        self._master = master

    def wait(self, condition: Callable[[str], bool], seconds: float = 60) -> None:
        """Read until the picture, what follows the cursor's last way home, meets a condition."""
        deadline = time.monotonic() + seconds
        while not condition(self.written.split("\x1b[H")[-1]):
            assert time.monotonic() < deadline, self.written[-4000:]
            ready, _, _ = select.select([self._master], [], [], 0.2)
            if ready:
                # The other end is closed when the process is gone.
                with suppress(OSError):
                    self.written += os.read(self._master, 1 << 16).decode(errors="replace")


@contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlafleet", *map(str, arguments)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_watch_in_a_terminal(exporter: Exporter, operator: Path) -> None:
    """It waits for a run, says that the exporter is away and takes it up again, and leaves the terminal as it was."""
    with terminal(
        "watch", "--identity", operator, "--exporter", exporter.address, "--interval", "0.5"
    ) as screen:
        screen.wait(lambda seen: "no run yet" in seen)
        assert "\x1b[?1049h" in screen.written
        run(exporter.runs, [record(0, LOSSES)], rounds=4)
        screen.wait(lambda seen: "round 0 of 4" in seen)
        exporter.stop()
        screen.wait(lambda seen: "No answer for 2 s" in seen and "site-b" in seen)
        exporter.start()
        screen.wait(lambda seen: "site-b" in seen and "No answer" not in seen)
        screen.process.send_signal(signal.SIGINT)
        assert screen.process.wait(60) == 0
        # Back on the terminal's own screen, with its cursor and the last picture.
        screen.wait(lambda _: "site-b" in screen.written.partition("\x1b[?1049l")[2])
        assert screen.written.rindex("\x1b[?25h") > screen.written.rindex("\x1b[?25l")
        assert "Traceback" not in screen.written


def test_a_watch_that_is_terminated_leaves_the_terminal_as_it_was(
    exporter: Exporter, operator: Path
) -> None:
    with terminal("watch", "--identity", operator, "--exporter", exporter.address) as screen:
        screen.wait(lambda seen: "no run yet" in seen)
        screen.process.terminate()
        assert screen.process.wait(60) == 0
        screen.wait(lambda _: "no run yet" in screen.written.partition("\x1b[?1049l")[2])


def test_watch_in_a_pipe_appends(exporter: Exporter, operator: Path) -> None:
    run(exporter.runs, [record(0, LOSSES)], rounds=4)
    process = subprocess.Popen(
        [sys.executable, "-m", "vlafleet", "watch", "--identity", str(operator),
         "--exporter", exporter.address, "--interval", "0.5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "80"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        heads = 0
        while heads < 3:
            heads += process.stdout.readline().startswith("test  SuperLink unreachable")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out
