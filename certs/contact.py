"""When a process last heard from its server: a file's modification time, for the health probe beside it."""

import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from certs.errors import StorageError
from certs.roles import Peer


def contact_file(peer: Peer) -> Path:
    """Return the file of a holder, in a directory of this user's own."""
    directory = Path(tempfile.gettempdir()) / f"vlafleet-{os.getuid()}"
    return directory / f"{peer.federation}.{peer.role}.{peer.name}.contact"


def recorder(peer: Peer) -> Callable[[Any], None]:
    """Return an httpx response hook that notes every answer the server did not refuse.

    The file is removed first: a probe must not take the last process's contact for this one's.
    """
    path = contact_file(peer)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    status = path.parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        # The temporary directory is everybody's: a link planted there would lead our writes elsewhere.
        raise StorageError(f"{path.parent} belongs to somebody else; remove it, or set TMPDIR")
    path.unlink(missing_ok=True)

    def note(response: Any) -> None:
        if response.is_success:
            path.touch()

    return note


def seconds_since_contact(peer: Peer) -> float | None:
    """Return the seconds since the last contact, None when there was none."""
    try:
        return max(0.0, time.time() - contact_file(peer).stat().st_mtime)
    except OSError:
        return None
