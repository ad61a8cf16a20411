"""The runs directory as it is followed: what is new since the last look is read, nothing twice.

It belongs to the ServerApp, which may write, and to operators, who may delete and copy runs, at any moment. So a run
that cannot be read is counted and said, and the others are followed.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from app import run_progress
from app.journal import CONFIG, LATEST, parse, read_config
from app.journal import ROUNDS as LINES
from app.run_progress import FILE
from app.series import Record
from app.standing import ROUNDS, Course, Standing
from app.totals import Totals
from certs.errors import RunFailedError, StorageError

_log = logging.getLogger("vlafleet.exporter")


# What reading a line raises that is JSON of this release and no record of a round.
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)

# Tells one version of a file from the next: device and inode, size, time of change. None: it is not there.
type _Version = tuple[int, ...] | None


@dataclass(frozen=True)
class View:
    """What the runs say at one moment.

    ``config``, ``rounds`` (its last ``app.standing.ROUNDS`` lines), ``progress`` and ``standing`` are those of the
    newest run; ``config`` is None when there is no run. ``totals`` are over all runs, ``unreadable`` is how many of
    them are damaged or of another release.
    """

    config: dict[str, Any] | None = None
    rounds: Sequence[Record] = ()
    progress: dict[str, Any] | None = None
    totals: Totals = field(default_factory=Totals)
    unreadable: int = 0
    standing: Standing = field(default_factory=Standing)


class Runs:
    """Follows the runs below ``root``; the directory need not be there yet.

    A round is counted once, and stays counted when its run is deleted, so that no counter falls. A new process counts
    what is there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._runs: dict[str, _Run] = {}
        self._newest: _Run | None = None
        self._totals = Totals()
        self.view = View()

    def refresh(self) -> bool:
        """Read what is new; True when ``view`` has changed.

        ``StorageError`` when the directory cannot be listed; ``view`` is then as it was.
        """
        for name in self._directories():
            if name not in self._runs:
                self._runs[name] = _Run(self._root / name, self._totals)
        changed = False
        for run in self._runs.values():
            changed |= run.look_at_config()
        newest = self._find_newest()
        if newest is not self._newest:
            if self._newest is not None:
                self._newest.forget()
            if newest is not None:
                newest.remember()
            self._newest = newest
            changed = True
        for run in self._runs.values():
            changed |= run.look_at_lines()
        if newest is not None:
            changed |= newest.look_at_progress()
        if changed:
            self.view = self._view()
        return changed

    def _directories(self) -> list[str]:
        try:
            with os.scandir(self._root) as entries:
                # 'latest' is a link, and leads to one of the others.
                return sorted(
                    entry.name for entry in entries if entry.is_dir(follow_symlinks=False)
                )
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(
                f"the runs in {self._root} cannot be listed ({error.strerror}): name the directory "
                "that the ServerApp writes with --runs, and check its owner"
            ) from error

    def _find_newest(self) -> _Run | None:
        """The run that ``latest`` leads to; where that is no run, the one that began last."""
        try:
            named = self._runs.get(os.readlink(self._root / LATEST))
        except OSError:
            named = None
        if named is not None and named.started_at is not None:
            return named
        runs = [run for run in self._runs.values() if run.started_at is not None]
        return max(runs, key=lambda run: (run.started_at, run.directory.name), default=None)

    def _view(self) -> View:
        newest = self._newest
        # Others read the view while this one counts on.
        totals = self._totals.copy()
        unreadable = sum(run.unreadable for run in self._runs.values())
        if newest is None or newest.course is None:
            return View(totals=totals, unreadable=unreadable)
        return View(
            config=newest.config,
            rounds=tuple(newest.rounds),
            progress=newest.progress,
            totals=totals,
            unreadable=unreadable,
            standing=newest.course.standing(),
        )


class _Run:
    """One run's directory, counted into ``totals``; when it is the newest, also how it stands."""

    def __init__(self, directory: Path, totals: Totals) -> None:
        self.directory = directory
        self._totals = totals
        # Rounds below this number are counted.
        self._counted = 0
        # None: no config.json that can be read.
        self.started_at: str | None = None
        self.config: dict[str, Any] | None = None
        self.progress: dict[str, Any] | None = None
        self.course: Course | None = None
        self.rounds: deque[Record] = deque(maxlen=ROUNDS)
        self._config_version: _Version = None
        self._lines_version: _Version = None
        self._progress_version: _Version = None
        self._bad_config = self._bad_lines = False
        self._offset = self._number = 0
        self._sites: list[str] = []

    @property
    def unreadable(self) -> bool:
        """Whether some of what is there cannot be read."""
        return self._bad_config or self._bad_lines

    def look_at_progress(self) -> bool:
        """Read ``progress.json`` if it changed; True when it did."""
        version = _version(self.directory / FILE)
        if version == self._progress_version:
            return False
        self._progress_version = version
        self.progress = _read_progress(self.directory / FILE, self.directory.name)
        return True

    def remember(self) -> None:
        """Begin to keep how the run stands: read all of it again."""
        self.course = Course()
        self._config_version = self._lines_version = self._progress_version = None
        self.look_at_config()

    def forget(self) -> None:
        """Keep the counts only."""
        self.course = self.config = self.progress = None
        self.rounds.clear()

    def look_at_config(self) -> bool:
        """Read ``config.json`` if it changed; True when it did."""
        path = self.directory / CONFIG
        version = _version(path)
        if version == self._config_version:
            return False
        self._config_version = version
        self.started_at, self.config = None, None
        self._bad_config = False
        if version is None:
            return True
        try:
            config = read_config(self.directory)
            sites = _described(config, path)
        except RunFailedError as error:
            self._bad_config = True
            _log.error("%s", error)
            return True
        self.started_at, self._sites = config["started_at"], sites
        self._totals.describe(sites)
        if self.course is not None:
            self.config = config
            self.course.describe(sites)
        return True

    def look_at_lines(self) -> bool:
        """Read what is new of ``rounds.jsonl``; True when something is."""
        path = self.directory / LINES
        version = _version(path)
        if version == self._lines_version:
            return False
        before, self._lines_version = self._lines_version, version
        if version is None:
            self._bad_lines = False
            return True
        if before is None or before[:2] != version[:2] or version[2] < self._offset:
            self._begin_again()
            self._lines_version = version
        try:
            with path.open("rb") as file:
                for line in self._lines(file):
                    self._take(line, path)
        except OSError as error:
            self._bad_lines = True
            _log.error("%s cannot be read: %s", path, error.strerror)
        return True

    def _begin_again(self) -> None:
        self._offset = self._number = 0
        self._lines_version = None
        self._bad_lines = False
        self.rounds.clear()
        if self.course is not None:
            self.course = Course()
            self.course.describe(self._sites)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The whole lines from where the last look ended; a line without its newline is not there yet."""
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            self._number += 1
            yield line

    def _take(self, line: bytes, path: Path) -> None:
        where = f"Line {self._number} of {path}"
        try:
            try:
                record = parse(line.decode(), where)
                # Of a file that is read again, what is counted already is not counted twice.
                if record["round"] >= self._counted:
                    self._totals.add(record)
                    self._counted = record["round"] + 1
                if self.course is not None:
                    self.course.add(record)
                    self.rounds.append(record)
            except _DAMAGED as error:
                raise RunFailedError(
                    f"{where} is no record of a round ({error!r}): the record of this run is damaged."
                ) from error
        except RunFailedError as error:
            if not self.unreadable:
                _log.error("%s", error)
            self._bad_lines = True


def _described(config: Record, path: Path) -> list[str]:
    """The names of the sites that have described themselves; ``RunFailedError`` for what is no run's config."""
    sites, settings = config.get("sites") or {}, config.get("config")
    try:
        datetime.fromisoformat(config["started_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunFailedError(
            f"{path} does not say when the run began: the record of this run is damaged."
        ) from error
    if not isinstance(settings, dict) or not isinstance(sites, dict):
        raise RunFailedError(
            f"{path} holds no settings, or no sites by name: the record of this run is damaged."
        )
    return list(sites)


def _read_progress(path: Path, run: object) -> dict[str, Any] | None:
    """What ``run`` is at; None where that is not said."""
    try:
        progress = json.loads(path.read_bytes())
        known = progress["schema"] == run_progress.SCHEMA and progress["run"] == run
        float(progress["since"]), int(progress["round"]), str(progress["phase"])
        known &= all(isinstance(site, dict) for site in progress["sites"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return progress if known else None


def _version(path: Path) -> _Version:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        # Whoever opens it learns why.
        return 0, 0, 0, 0
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
