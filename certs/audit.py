"""The audit log: who did what and from where, one JSON object (RFC 8259) a line, only ever appended.

Several processes may write one file: a line is one ``write`` with ``O_APPEND``, under the file's lock.
"""

import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from certs.errors import StorageError
from certs.roles import Peer

_log = logging.getLogger("vlafleet.audit")

# What anybody can cause at any rate: limited, and not worth a disk's time each.
REFUSALS = frozenset(
    {"enrolment-refused", "renewal-refused", "request-refused", "handshake-refused"}
)
EVENTS = REFUSALS | {
    *("invited", "invitation-cancelled", "enrolled", "approved", "renewed", "revoked"),
    *("run-started", "run-stopped"),
}

# Of each kind of refusal, so that a flood of one hides no other.
_REFUSALS_PER_SECOND = 5.0
_BURST = 50.0
_MAX_CHARACTERS = 300
# Nothing here is given a secret on purpose; a caller's own text (a path, a name) may hold one that was pasted there.
_SECRET = re.compile(r"(vlafleet1\.)[A-Za-z0-9_-]+|(-----BEGIN [A-Z ]*PRIVATE KEY-----).*", re.S)


class Audit:
    """An audit log in a file of mode 0600, made when it is not there; it may be rotated by renaming it."""

    def __init__(self, path: Path) -> None:
        """Raise ``StorageError`` when the file cannot be written: nothing is to happen that is not recorded."""
        self._path = path
        self._limits = {event: _Limit() for event in REFUSALS}
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(self._open())
        except OSError as error:
            raise StorageError(
                f"the audit log {path} cannot be written: {error.strerror}; "
                "check its directory and owner"
            ) from error

    def record(
        self,
        event: str,
        *,
        by: Peer | None = None,
        address: str | None = None,
        **details: str | int | float | bool | None,
    ) -> None:
        """Append a line; ``by`` is whose certificate asked, ``address`` from where.

        It is on the disk when this returns, a refusal only in the system's hands. A refusal beyond the limit is
        counted, and the next line of its kind says how many were ``suppressed``. A line that cannot be written goes
        to the process's log instead.
        """
        if event not in EVENTS:
            raise ValueError(f"{event!r} is not an audit event")
        limit = self._limits.get(event)
        suppressed = limit.take() if limit else 0
        if suppressed is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "role": by.role if by else None,
            "name": by.name if by else None,
            "serial": f"{by.serial:x}" if by else None,
            "address": address,
            **details,
            **({"suppressed": suppressed} if suppressed else {}),
        }
        text = json.dumps({name: _bounded(value) for name, value in line.items()})
        try:
            self._append(text.encode() + b"\n", sync=limit is None)
        except OSError as error:
            _log.error("%s cannot be written (%s): %s", self._path, error.strerror, text)

    def refused_request(self, refused: Mapping[str, str]) -> None:
        """Record what a guard refused (``certs.guard.OnRefused``)."""
        details = {name: text or None for name, text in refused.items()}
        self.record("request-refused", by=None, address=details.pop("address"), **details)

    def refused_handshake(self, reason: str, sentence: str, address: str) -> None:
        """Record a TLS handshake that a server refused."""
        self.record("handshake-refused", address=address, reason=reason, detail=sentence)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def _append(self, line: bytes, *, sync: bool) -> None:
        descriptor = self._open()
        try:
            # A reader of the last byte could otherwise meet the middle of another process's line.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            # A full disk or a power cut may have left half a line: this one does not join it.
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(None, f"only {written} of {len(line)} bytes fit")
            # Nobody waits for the disk but who asked for it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Limit:
    """How many refusals of a kind are still written (a token bucket)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = _BURST
        self._at = time.monotonic()
        self._suppressed = 0

    def take(self) -> int | None:
        """Return how many were suppressed before this one, or None when this one is, too."""
        with self._lock:
            now = time.monotonic()
            self._left = min(_BURST, self._left + (now - self._at) * _REFUSALS_PER_SECOND)
            self._at = now
            if self._left < 1:
                self._suppressed += 1
                return None
            self._left -= 1
            suppressed, self._suppressed = self._suppressed, 0
            return suppressed


def _bounded(value: str | int | float | bool | None) -> str | int | float | bool | None:
    """Return a value that is short and prints on one line, whoever reads it with whatever."""
    if not isinstance(value, str):
        return value
    value = _SECRET.sub(r"\1\2[removed]", value[: 4 * _MAX_CHARACTERS])
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return shown if len(shown) <= _MAX_CHARACTERS else shown[: _MAX_CHARACTERS - 1] + "…"
