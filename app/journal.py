"""The record of a run: ``runs/<run>/config.json`` and one line per round in ``rounds.jsonl``.

Every reader of a run (report, model card, comparison) goes by these two files alone. A metric that
was not measured is null, never 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.durable import point, sync, write_json
from certs.errors import RunFailedError, StorageError

# Raised when a field's meaning changes; readers refuse versions they do not know.
SCHEMA = 1
CONFIG = "config.json"
ROUNDS = "rounds.jsonl"
LATEST = "latest"


def runs_root() -> Path:
    """Where runs are written: ``VLAFLEET_RUNS``, else ``runs`` below the working directory."""
    return Path(os.environ.get("VLAFLEET_RUNS") or "runs").absolute()


class Journal:
    """Writes the record of one run; every call returns when its data is on disk."""

    def __init__(self, root: Path, run: str) -> None:
        self.directory = root / run
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(root)
            point(root / LATEST, run)
        except OSError as error:
            raise StorageError(
                f"The run's directory {self.directory} cannot be made ({error.strerror}): check who "
                "owns the directory that VLAFLEET_RUNS names."
            ) from error

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
    return _record(text, f"{path}")


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
    return [_record(line, f"Line {n} of {path}") for n, line in enumerate(lines[:-1], start=1)]


def _record(text: str, where: str) -> dict[str, Any]:
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
