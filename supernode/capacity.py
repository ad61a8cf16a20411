"""The room a site has: on the disk below its directory, and in the host's memory."""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from certs import memory
from certs.errors import HardwareError, StorageError
from supernode.findings import Finding, fail, ok, size, warning
from supernode.site import Site

# What logs, keys and an unpacked app bundle take; a disk with less is full.
_LEAST_BYTES = 100_000_000


def disk(site: Site, estimate: dict[str, Any] | None) -> list[Finding]:
    """Say whether what the site keeps finds room; what lies there already needs none."""
    needs = {site.state: 0, site.cache: 0}
    if estimate:
        needs = {
            site.state: max(estimate["state_bytes"] - _held(site.state), 0),
            site.cache: max(_cached(estimate) - _held(site.cache), 0),
        }
    findings = []
    for folder in needs:
        there = _existing(folder)
        if not os.access(there, os.W_OK | os.X_OK):
            findings.append(
                fail("disk", f"{there} cannot be written", "Give it to the user the site runs as.", StorageError)
            )  # fmt: skip
    if findings:
        return findings
    by_device: dict[int, list[Path]] = defaultdict(list)
    for folder in needs:
        by_device[_existing(folder).stat().st_dev].append(folder)
    return [_room(folders, needs, site, known=bool(estimate)) for folders in by_device.values()]


def _room(folders: list[Path], needs: dict[Path, int], site: Site, *, known: bool) -> Finding:
    """Judge one file system."""
    free = shutil.disk_usage(_existing(folders[0])).free
    where = " and ".join(str(folder) for folder in folders)
    sentence = f"{size(free)} free for {where}"
    must = sum(needs[folder] for folder in folders if folder == site.state)
    whole = sum(needs[folder] for folder in folders)
    free_it = "Free space there, or join with a --directory on a larger disk."
    if free < must + _LEAST_BYTES:
        need = f"a run's state takes {size(must)} more" if must else "that is as good as full"
        return fail("disk", f"{sentence}, and {need}", free_it, StorageError)
    if free < whole + _LEAST_BYTES:
        return warning(
            "disk",
            f"{sentence}, and a run takes {size(whole)} more, {size(whole - must)} of it for the cache of what the "
            "frozen model makes of the frames: it is kept in part or not at all, and steps take longer",
            free_it,
        )
    if not known:
        return ok("disk", f"{sentence}; what a run takes was not estimated")
    return ok("disk", f"{sentence}; a run takes up to {size(whole)} more")


def _cached(estimate: dict[str, Any]) -> int:
    """Bytes of the prefix cache that may lie on the disk; what holds embeddings is whichever has more room."""
    return int(estimate["cache_bytes"]) if estimate["cache_tier"] in ("disk", "embeddings") else 0


def host(estimate: dict[str, Any] | None) -> Finding:
    """Say whether the host has the memory that training takes."""
    free, most = memory.available(), memory.limit()
    sentence = f"{size(free)} of {size(most)} of memory free"
    if not estimate:
        return ok("memory", f"{sentence}; what training takes was not estimated")
    need = estimate["memory_bytes"]
    if most < need:
        return fail(
            "memory",
            f"{sentence}, and training takes about {size(need)}",
            "Use a machine, or a container limit, with more memory; or ask the federation's operator for a smaller "
            "batch-size.",
            HardwareError,
        )
    if free < need:
        return warning(
            "memory",
            f"{sentence}, and training takes about {size(need)}",
            "Unless this site's own trainer uses it, end other programs before a run.",
        )
    return ok("memory", f"{sentence}; training takes about {size(need)}")


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _held(folder: Path) -> int:
    """Return the bytes that files below a folder take on the disk."""
    held = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                held += os.lstat(os.path.join(where, name)).st_blocks * 512
            except OSError:  # a run that goes on removes files
                continue
    return held
