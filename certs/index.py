"""The authority's index: one line for each certificate that was issued."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from certs.errors import CertificateError
from certs.files import read, write_atomic
from certs.lifetime import CLOCK_SKEW
from certs.roles import Role


@dataclass(frozen=True)
class Issued:
    """One line of the index.

    ``authorities`` are the generations whose certificates the holder was handed with it; the first one signed it.
    """

    serial: int
    role: Role
    name: str
    not_after: datetime
    authorities: tuple[int, ...]
    revoked_at: datetime | None = None
    # None in what an earlier version wrote.
    issued_at: datetime | None = None

    def state(self, now: datetime) -> str:
        """``valid``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.not_after <= now else "valid"

    def forgotten(self, now: datetime) -> bool:
        """Whether it expired so long ago that no clock takes it for valid."""
        return self.not_after + CLOCK_SKEW <= now

    def to_json(self) -> dict[str, object]:
        """Return the line as JSON values (the serial in hex, as OpenSSL prints it)."""
        return {
            **vars(self),
            "serial": f"{self.serial:x}",
            "not_after": self.not_after.isoformat(),
            "revoked_at": self.revoked_at and self.revoked_at.isoformat(),
            "issued_at": self.issued_at and self.issued_at.isoformat(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read a line written by ``to_json``."""
        revoked, issued = record["revoked_at"], record.get("issued_at")
        return cls(
            int(record["serial"], 16),
            Role(record["role"]),
            record["name"],
            datetime.fromisoformat(record["not_after"]),
            tuple(record["authorities"]),
            datetime.fromisoformat(revoked) if revoked else None,
            datetime.fromisoformat(issued) if issued else None,
        )


def read_index(path: Path) -> list[Issued]:
    """Return what was issued, in order; nothing where there is no index yet."""
    if not path.exists():
        return []
    try:
        lines = read(path, "index of certificates").decode().splitlines()
        return [Issued.from_json(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CertificateError(
            f"the index {path} is damaged, or of an earlier version of vlafleet ({error!r}); "
            "restore it from its backup, or make the federation anew in another directory"
        ) from error


def write_index(path: Path, issued: Sequence[Issued]) -> None:
    """Replace the index by all that is not forgotten, and of each holder the last that was issued."""
    now = datetime.now(UTC)
    last = {(line.role, line.name): line.serial for line in issued}
    kept = [
        line
        for line in issued
        if not line.forgotten(now) or last[line.role, line.name] == line.serial
    ]
    write_atomic(path, "".join(json.dumps(line.to_json()) + "\n" for line in kept).encode())
