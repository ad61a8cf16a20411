"""The invitations that are out: who may come in with which secret, and until when.

Only the secret's hash is kept. A file that leaks lets nobody in.
"""

import hmac
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from certs.errors import InvitationError, StorageError
from certs.files import write_atomic
from certs.invitation import new_secret, secret_hash
from certs.roles import checked_site
from superlink.refused import Refused

# Shorter, and it is over before it is copied; longer, and a forgotten one lies about for weeks.
MIN_SECONDS, MAX_SECONDS = 60, 7 * 24 * 3600
# How long 'site list' still shows how an invitation ended.
_KEEP_SECONDS = 30 * 24 * 3600


@dataclass(frozen=True)
class Entry:
    """What is kept of an invitation. Times are unix seconds; ``used_by`` is ``Candidate.fingerprint``."""

    secret_hash: str
    site: str
    created: int
    expires: int
    used_by: str | None = None
    cancelled: bool = False

    @property
    def id(self) -> str:
        """How people and logs name it: the first 8 hex digits of the hash."""
        return self.secret_hash[:8]

    def state(self, now: float) -> str:
        """``open``, ``used``, ``cancelled`` or ``expired``."""
        if self.used_by is not None:
            return "used"
        if self.cancelled:
            return "cancelled"
        return "expired" if self.expires <= now else "open"

    def to_json(self, now: float) -> dict[str, str | int]:
        """Return what an operator sees of it."""
        return {
            "site": self.site,
            "id": self.id,
            "created": self.created,
            "expires": self.expires,
            "state": self.state(now),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what ``asdict`` wrote."""
        entry = cls(**record)
        if not isinstance(entry.secret_hash, str) or not isinstance(entry.site, str):
            raise TypeError("a hash and a site are strings")
        return replace(entry, created=int(entry.created), expires=int(entry.expires))


class Invitations:
    """The invitations of a federation in one file, mode 0600. Safe to share between threads.

    ``clock`` is unix time.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._entries = _read(path)

    def create(self, site: str, valid_seconds: int) -> tuple[bytes, Entry]:
        """Invite a site; return the secret, kept nowhere, and the entry. What was open for it is cancelled."""
        checked_site(site)
        if not MIN_SECONDS <= valid_seconds <= MAX_SECONDS:
            raise InvitationError(
                f"an invitation is valid for 1 minute to 7 days, not for {valid_seconds} s"
            )
        secret = new_secret()
        now = int(self._clock())
        entry = Entry(secret_hash(secret), site, now, now + valid_seconds)
        with self._lock:
            self._write([*self._without(site)[0], entry])
        return secret, entry

    def cancel(self, site: str) -> int:
        """End every invitation of a site, so that a used one brings nobody back; return how many were open."""
        with self._lock:
            entries, opened = self._without(site)
            if entries != self._entries:
                self._write(entries)
        return opened

    def require(self, secret: bytes, site: str, fingerprint: str) -> Entry:
        """Return the invitation that lets the holder of these keys in as ``site``; raise ``Refused`` otherwise."""
        wanted = secret_hash(secret)
        found: Entry | None = None
        with self._lock:
            # Every entry is compared, each in the same time: an answer's time tells nothing about the hashes.
            for entry in self._entries:
                if hmac.compare_digest(entry.secret_hash, wanted):
                    found = entry
        if found is None:
            raise Refused(
                "unknown",
                "this federation does not know the invitation: ask its operator for a new one",
            )
        if found.site != site:
            raise Refused(
                "site", f"the invitation is for another site than {site!r}; join under its name"
            )
        if found.cancelled:
            raise Refused(
                "cancelled", "the invitation was cancelled: ask the operator for a new one"
            )
        if found.expires <= self._clock():
            raise Refused("expired", "the invitation has expired: ask the operator for a new one")
        if found.used_by is not None and not hmac.compare_digest(found.used_by, fingerprint):
            raise Refused(
                "used",
                "the invitation was used by another machine: ask the operator for a new one, and "
                "tell them if that was not you",
            )
        return found

    def use(self, entry: Entry, fingerprint: str) -> None:
        """Note that the keys with this fingerprint came in with an invitation."""
        with self._lock:
            self._write(
                [
                    replace(each, used_by=fingerprint)
                    if each.secret_hash == entry.secret_hash
                    else each
                    for each in self._entries
                ]
            )

    def listed(self) -> list[dict[str, str | int]]:
        """Return what an operator sees of each, in order of creation."""
        now = self._clock()
        with self._lock:
            return [entry.to_json(now) for entry in self._entries]

    def _without(self, site: str) -> tuple[list[Entry], int]:
        """Return the entries with those of a site cancelled, and how many of these were open."""
        now = self._clock()
        mine = {entry for entry in self._entries if entry.site == site and entry.expires > now}
        entries = [
            replace(entry, cancelled=True) if entry in mine else entry for entry in self._entries
        ]
        return entries, sum(entry.state(now) == "open" for entry in mine)

    def _write(self, entries: list[Entry]) -> None:
        oldest = self._clock() - _KEEP_SECONDS
        entries = [entry for entry in entries if entry.expires > oldest]
        text = json.dumps({"invitations": [asdict(entry) for entry in entries]}, indent=1)
        write_atomic(self._path, text.encode(), private=True)
        self._entries = entries


def _read(path: Path) -> list[Entry]:
    try:
        record = json.loads(path.read_bytes())
        return [Entry.from_json(entry) for entry in record["invitations"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(
            f"the invitations {path} cannot be read: {error.strerror}; check the file's owner"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"the invitations {path} are damaged ({error}); move the file away, and invite anew "
            "the sites that have not joined"
        ) from error
