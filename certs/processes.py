"""The processes that a command runs beside each other, each the ``vlafleet`` command with an identity of its own."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from certs.errors import RunFailedError
from certs.logs import entry
from certs.parent import end_with_parent

# A SuperNode tells the SuperLink that it goes, the SuperLink lets open requests end.
_STOP_SECONDS = 15.0
# Weeks of a SuperNode's log. One of this size is kept beside it as LOG.1, in place of the one before.
_LOG_BYTES = 10_000_000
# More than a line of a log has, a traceback in JSON among them.
_TAIL_BYTES = 1 << 16


@dataclass
class Processes:
    """Running processes, in the order they were started; ended by the kernel should this one be killed."""

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        """Start ``vlafleet ARGUMENTS`` with its output appended to ``logs/NAME.log``."""
        log = self.log(name)
        trim(log)
        with log.open("ab") as output:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "vlafleet", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                # A terminal's Ctrl-C reaches this process alone, which then ends the others in order.
                start_new_session=True,
                # Safe: no thread runs yet while processes are started.
                preexec_fn=functools.partial(end_with_parent, signal.SIGTERM),  # noqa: PLW1509
            )

    def log(self, name: str) -> Path:
        """Where a process says what it does."""
        return self.logs / f"{name}.log"

    def check(self) -> None:
        """Raise ``RunFailedError`` when a process has ended on its own."""
        for name, process in self.running.items():
            if process.poll() is not None:
                log = self.log(name)
                raise RunFailedError(
                    f"{name} ended with exit code {process.returncode}: "
                    f"{last_line(log) or 'it said nothing'} ({log})"
                )

    def stop(self) -> None:
        """End every process, the last started first, so that each can still tell its server that it goes."""
        for process in reversed(self.running.values()):
            process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for process in reversed(self.running.values()):
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running.clear()


def trim(log: Path) -> None:
    """Move a large log's content to ``LOG.1``; a process that appends to it goes on at its top."""
    # Neither there is one always, nor is there space.
    with contextlib.suppress(OSError):
        if log.stat().st_size > _LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def last_line(log: Path) -> str:
    """Return what the last line of a log says, empty when it says nothing."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return (entry(last) or ("", last))[1]
