"""Keeps a site's trainer running: starts it, starts it again when it ends, and notes how it ended."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from certs.errors import StorageError, first_line

# Names the trainer's socket to the ClientApps.
SOCKET = "VLAFLEET_TRAINER"
# Beside the socket: how the last trainer ended.
_ENDED = "ended.json"
# Not its working directory's modules: what runs is what is installed.
COMMAND = (sys.executable, "-P", "-m", "app.trainer")
# Seconds before the trainer is started again: doubled each time it ends early, up to the longest.
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# Seconds after which it has not ended early: its imports take 20 at most.
_SETTLED_S = 60.0
# Seconds for the trainer to write what it still holds when the SuperExec ends; Flower allows 5 for all of it.
_STOP_S = 3.0
# Connections that wait while the trainer starts.
_BACKLOG = 16

_log = logging.getLogger("vlafleet.supervisor")


@contextlib.contextmanager
def supervised(command: Sequence[str] = COMMAND, *, without: str | None = None) -> Iterator[Path]:
    """Keep a trainer running; yield the path of its socket.

    The socket belongs to this process and outlives the trainer: who connects while it starts, waits. ``without`` is a
    variable of the environment that the trainer has no use for. Raises ``StorageError``.
    """
    with contextlib.ExitStack() as stack:
        try:
            temporary = tempfile.TemporaryDirectory(prefix="vlafleet-trainer-")  # mode 0700
            path = Path(stack.enter_context(temporary)) / "trainer"
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise StorageError(
                f"The trainer's socket cannot be made below {tempfile.gettempdir()} "
                f"({first_line(error)}): let TMPDIR name a directory with a short path that can be "
                "written."
            ) from error
        supervisor = _Supervisor(command, listener, path.parent / _ENDED, without)
        supervisor.start()
        stack.callback(supervisor.stop)
        # First of all: Flower ends a SuperExec that takes more than 5 s, and a trainer may take 3 of them.
        stack.callback(temporary.cleanup)
        _log.info("the trainer listens at %s", path)
        yield path


class _Supervisor(threading.Thread):
    def __init__(
        self, command: Sequence[str], listener: socket.socket, ended: Path, without: str | None
    ) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._command = [*command, str(listener.fileno())]
        self._descriptor = listener.fileno()
        self._environment = {k: v for k, v in os.environ.items() if k != without}
        self._ended = ended
        self._stopping = threading.Event()
        # Held while a trainer is started, so that none is after ``stop``.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        times = early = 0
        while True:
            started = time.monotonic()
            try:
                process = self._start()
                if process is None:
                    return
                pid, ended = process.pid, how(process.wait())
            except OSError as error:
                pid, ended = 0, f"it cannot be started: {error}"
            if self._stopping.is_set():
                return
            times += 1
            early = 0 if time.monotonic() - started > _SETTLED_S else early + 1
            pause = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**early)
            _log.warning("the trainer ended: %s; it starts again in %.1f s", ended, pause)
            self._note({"pid": pid, "how": ended, "times": times})
            self._stopping.wait(pause)

    def stop(self) -> None:
        """End the trainer; it may finish what it writes."""
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self.join()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            # Its parent, whose end ends it, is this very thread (prctl(2), PR_SET_PDEATHSIG).
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=[self._descriptor],
            )
            return self._process

    def _note(self, said: dict[str, int | str]) -> None:
        written = self._ended.with_suffix(".new")
        # Without it a ClientApp learns that the trainer ended, and not how.
        with contextlib.suppress(OSError):
            written.write_text(json.dumps(said))
            written.replace(self._ended)


def ended(path: Path) -> dict[str, Any]:
    """What was noted when the last trainer behind the socket ``path`` ended; empty while none has.

    Its ``pid``, ``how`` it ended, and how many ``times`` one did since the SuperExec started.
    """
    try:
        found: dict[str, Any] = json.loads((path.parent / _ENDED).read_text())
    except FileNotFoundError:
        return {}
    return found


def restarts(path: Path) -> int:
    """How often the trainer behind the socket ``path`` ended, to be started again."""
    return int(ended(path).get("times", 0))


def how(code: int) -> str:
    """How a process with this return code ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    number = signal.Signals(-code)
    said = f"killed by signal {-code}, {number.name}"
    return said + ", as when memory runs out" if number == signal.SIGKILL else said
