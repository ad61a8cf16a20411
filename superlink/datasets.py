"""What each site trains on, in numbers, as the sites report it: one file, mode 0600."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certs.errors import StorageError
from certs.files import write_atomic
from superlink.refused import Refused

FIELDS = ("episodes", "frames", "bytes", "fps")
# The largest whole number that every JSON reader keeps.
_MAX = 2**53 - 1


class Datasets:
    """The last report of each site. Safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._reports: dict[str, dict[str, int]] = (
                json.loads(path.read_bytes()) if path.exists() else {}
            )
        except (OSError, ValueError) as error:
            raise StorageError(
                f"the dataset reports {path} cannot be read ({error}); remove the file: "
                "the sites report again when they start"
            ) from error

    def report(self, site: str, record: Any) -> None:
        """Keep what a site says of its dataset; raise ``Refused`` unless it is ``FIELDS``, whole numbers."""
        if not isinstance(record, Mapping) or set(record) != set(FIELDS):
            raise Refused("malformed", f"a dataset report has the fields {', '.join(FIELDS)}")
        for name, value in record.items():
            if type(value) is not int or not 0 <= value <= _MAX:
                raise Refused(
                    "malformed", f"a dataset report's {name} is a whole number, zero or more"
                )
        with self._lock:
            if self._reports.get(site) != record:
                reports = {**self._reports, site: dict(record)}
                write_atomic(self._path, json.dumps(reports).encode(), private=True)
                self._reports = reports

    def of(self, site: str) -> Mapping[str, int]:
        """Return what a site reported; nothing where it did not."""
        return self._reports.get(site, {})
