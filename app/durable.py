"""Files that are whole or not there after a crash: written aside, synced, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_json(path: Path, content: object) -> None:
    """Replace ``path`` with ``content`` as JSON, atomically and on disk."""
    work = path.with_name(f".{path.name}.tmp")
    with work.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    work.rename(path)
    sync(path.parent)


def point(link: Path, name: str) -> None:
    """Make the symbolic link ``link`` lead to its sibling ``name``, atomically."""
    work = link.with_name(f".{link.name}.tmp")
    work.unlink(missing_ok=True)
    work.symlink_to(name)
    work.rename(link)
    sync(link.parent)


def sync(folder: Path) -> None:
    """Make the entries of ``folder`` durable: fsync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
