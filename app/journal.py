"""The record of a run: ``runs/<run>/config.json`` and one line per round in ``rounds.jsonl``.

Every reader of a run (report, model card, comparison) goes by these two files alone. A metric that
was not measured is null, never 0.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.durable import point, sync, write_json
from certs.errors import RunFailedError, StorageError

# Raised when a field's meaning changes; readers refuse versions they do not know.
SCHEMA = 2
CONFIG = "config.json"
ROUNDS = "rounds.jsonl"
LATEST = "latest"
# Held by the ServerApp that writes the run; the kernel releases it when that process ends.
_LOCK = ".lock"


def runs_root() -> Path:
    """Where runs are written: ``VLAFLEET_RUNS``, else ``runs`` below the working directory."""
    return Path(os.environ.get("VLAFLEET_RUNS") or "runs").absolute()


class Journal:
    """Writes the record of one run; every call returns when its data is on disk.

    ``StorageError`` when the directory cannot be made, or another process writes this run.
    """

    def __init__(self, root: Path, run: str) -> None:
        self.directory = root / run
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(root)
            point(root / LATEST, run)
            # Kept open: the lock lives as long as this process.
            self._lock = (self.directory / _LOCK).open("w")
        except OSError as error:
            raise StorageError(
                f"The run's directory {self.directory} cannot be made ({error.strerror}): check who "
                "owns the directory that VLAFLEET_RUNS names."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StorageError(
                f"Another ServerApp still works on the run in {self.directory}: wait for its end or "
                "stop it first."
            ) from error
        self._cut_off_half_a_line()

    def describe(self, record: Mapping[str, Any]) -> None:
        """Replace ``config.json``: what the run was asked for and, once known, who takes part."""
        write_json(self.directory / CONFIG, {"schema": SCHEMA, **_plain(record)})

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one round's record to ``rounds.jsonl``."""
        line = json.dumps({"schema": SCHEMA, **_plain(record)}, allow_nan=False) + "\n"
        with (self.directory / ROUNDS).open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        sync(self.directory)

    def close(self) -> None:
        """Let another process write this run."""
        self._lock.close()

    def _cut_off_half_a_line(self) -> None:
        """Remove what a crash left of a line: the next record would be glued to it."""
        path = self.directory / ROUNDS
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            if whole[2]:
                os.truncate(path, len(whole[0]) + len(whole[1]))


def unfinished(root: Path) -> str:
    """The run to resume, the newest below ``root``; ``RunFailedError`` when there is none."""
    latest = root / LATEST
    if not latest.is_symlink():
        raise RunFailedError(f"There is no run to resume in {root}: start one without resume.")
    return os.readlink(latest)


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a run; ``RunFailedError`` when it is not there or not readable."""
    path = directory / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunFailedError(
            f"{directory} holds no run (no {CONFIG}): give a directory below runs/."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunFailedError(f"{path} cannot be read: {error}.") from error
    return parse(text, f"{path}")


def read_rounds(directory: Path) -> list[dict[str, Any]]:
    """The rounds of a run in order; a last line cut off by a crash does not count."""
    path = directory / ROUNDS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunFailedError(f"{path} cannot be read: {error}.") from error
    # append() ends every record with a newline: what follows the last one is not a record.
    return [parse(line, f"Line {n} of {path}") for n, line in enumerate(lines[:-1], start=1)]


def parse(text: str, where: str) -> dict[str, Any]:
    """A record of this release, read from ``where``; ``RunFailedError`` when it is none."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise RunFailedError(
            f"{where} is not JSON ({error}): the record of this run is damaged."
        ) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        version = record.get("schema") if isinstance(record, dict) else None
        raise RunFailedError(
            f"{where} has version {version}, this vlafleet reads {SCHEMA}: use the release that "
            "wrote the run."
        )
    return record


def _plain(value: Any) -> Any:
    """``value`` for JSON: a number that is not finite was not measured, hence null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
