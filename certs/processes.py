"""The processes that a command runs beside each other, each the ``vlafleet`` command with an identity of its own."""

import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from certs.errors import RunFailedError
from certs.parent import end_with_parent

# A SuperNode tells the SuperLink that it goes, the SuperLink lets open requests end.
_STOP_SECONDS = 15.0


@dataclass
class Processes:
    """Running processes, in the order they were started; ended by the kernel should this one be killed."""

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *arguments: str, **environment: str) -> None:
        """Start ``vlafleet ARGUMENTS`` with its output in ``logs/NAME.log``."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as output:
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

    def check(self) -> None:
        """Raise ``RunFailedError`` when a process has ended on its own."""
        for name, process in self.running.items():
            if process.poll() is not None:
                log = self.logs / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise RunFailedError(
                    f"{name} ended with exit code {process.returncode}: "
                    f"{last[0] if last else 'it said nothing'} ({log})"
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
