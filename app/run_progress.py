"""What a run does right now: ``runs/<run>/progress.json``, replaced at each phase and as each site ends.

For those who watch: it is not synced, nothing is resumed from it, and a run goes on where it cannot be written.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from certs.errors import first_line

# Raised when a field's meaning changes.
SCHEMA = 1
FILE = "progress.json"
# What comes before the first round, or its resumption; then a round's own phases (app.rounds.Phase).
WAIT, DESCRIBE = "wait", "describe"
# A site that was asked and has not ended; then its app.rounds.State.
WORKING = "working"
_DONE = "done"

_log = logging.getLogger("flwr")


class RunProgress:
    """The phase a run is in since when, and the sites of the exchange that began last; safe for threads."""

    def __init__(self, directory: Path, run: str, rounds: int, number: int) -> None:
        """Begin to wait for sites in ``directory``; ``number`` is the next of ``rounds``."""
        self._path = directory / FILE
        self._lock = threading.Lock()
        self._writes = True
        self._sites: dict[str, dict[str, Any]] = {}
        self._said = {"schema": SCHEMA, "run": run, "round": number, "rounds": rounds}
        self.enter(WAIT)

    def enter(self, phase: str, number: int | None = None) -> None:
        """Be in ``phase``, of round ``number`` if it is another than before."""
        with self._lock:
            if number is not None:
                self._said["round"] = number
            self._said |= {"phase": phase, "since": time.time()}
            self._write()

    def asked(self, kind: str, sites: Iterable[str]) -> None:
        """An exchange begins: ``describe``, ``train`` or ``evaluate`` for these sites."""
        with self._lock:
            told = {"kind": kind, "state": WORKING, "reason": None, "since": time.time()}
            self._sites = {site: dict(told) for site in sorted(sites)}
            self._write()

    def ended(self, site: str, state: str, reason: str | None, *, name: str | None = None) -> None:
        """An asked site ended; ``name`` is what it is called if only its answer told."""
        with self._lock:
            entry = self._sites.pop(site)
            self._sites[name or site] = {
                **entry,
                "state": state,
                "reason": reason,
                "since": time.time(),
            }
            self._write()

    def close(self) -> None:
        """The run ended: nobody works for it any more."""
        with self._lock:
            self._sites = {}
            self._said |= {"phase": _DONE, "since": time.time()}
            self._write()

    def _write(self) -> None:
        written = self._path.with_name(f".{FILE}.tmp")
        try:
            written.write_text(json.dumps({**self._said, "sites": self._sites}), encoding="utf-8")
            written.replace(self._path)
        except OSError as error:
            if self._writes:
                _log.warning("%s cannot be written: %s", self._path, first_line(error))
            self._writes = False
