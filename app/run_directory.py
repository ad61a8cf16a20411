"""A run's directory as its readers use it: the record in, a text for people out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.journal import read_config, read_rounds
from app.series import Run
from certs.errors import RunFailedError, StorageError


def read_run(directory: Path) -> Run:
    """The record of a run; ``RunFailedError`` when it is not there or cannot be parsed."""
    return read_config(directory), read_rounds(directory)


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Turn what a damaged record makes of its readers into one sentence, ``RunFailedError``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunFailedError(
            f"The record in {where} is damaged ({type(error).__name__}: {error})."
        ) from error


def write_text(path: Path, text: str) -> Path:
    """Replace ``path`` in one step, so that a reader never meets half of it; ``StorageError``."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        work.rename(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror}): check who owns the directory."
        ) from error
    return path
