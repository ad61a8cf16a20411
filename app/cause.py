"""Why a site failed, in one word of a fixed set: fit for counting, and to go in the code of a Flower error.

The sentence that goes with it is for people.
"""

from __future__ import annotations

from typing import Final

from app.manifest import PayloadError
from certs.errors import (
    CertificateError,
    ConfigError,
    DatasetError,
    FleetError,
    ModelError,
    RunFailedError,
    StorageError,
)

# Numbers that are no numbers: training that diverged, or an update or a metric that is NaN or infinite.
FINITE: Final = "finite"
REVOKED: Final = "revoked"
UNEXPECTED: Final = "unexpected"

_CLASSES: Final[dict[type[FleetError], str]] = {
    DatasetError: "dataset",
    ModelError: "model",
    StorageError: "storage",
    ConfigError: "config",
    RunFailedError: "run",
    CertificateError: "certificate",
}
# A word's place is its code, and a site may be of another release than the SuperLink: new words go to the end.
WORDS: Final = (
    UNEXPECTED, *_CLASSES.values(),
    # app.manifest.Reason
    "missing", "schema", "codec", "kind", "size", "checksum", "names", "dtype", "shape", "base", "target", "frozen",
    FINITE, "norm", "frames", "metrics",
)  # fmt: skip
# Beyond Flower's own codes (flwr.common.constant.ErrorCode).
_FIRST: Final = 100


def of(error: BaseException) -> str:
    """The word for an exception: a payload's reason, or its class."""
    if isinstance(error, PayloadError):
        return error.reason
    found = (word for kind, word in _CLASSES.items() if isinstance(error, kind))
    return next(found, UNEXPECTED)


def code(error: BaseException) -> int:
    """The code of a Flower error that tells the other side the word."""
    return _FIRST + WORDS.index(of(error))


def told(number: int) -> str:
    """The word that a Flower error's code stands for; Flower's own codes are unexpected."""
    place = number - _FIRST
    return WORDS[place] if 0 <= place < len(WORDS) else UNEXPECTED
