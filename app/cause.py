"""Why a site failed, in one word of a fixed set: fit for counting, and to go in the code of a Flower error.

The sentence that goes with it is for people.
"""

from __future__ import annotations

from typing import Final, get_args

from app.manifest import PayloadError, Reason
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
# A word's place is its code: sites and SuperLink may be of different releases, so new words go to the end.
_WORDS: Final = (*_CLASSES.values(), *get_args(Reason.__value__))
# Beyond Flower's own codes (flwr.common.constant.ErrorCode).
_FIRST: Final = 100
# Flower's for whatever a ClientApp raises.
_RAISED: Final = 2


def of(error: BaseException) -> str:
    """The word for an exception: a payload's reason, or its class."""
    if isinstance(error, PayloadError):
        return error.reason
    found = (word for kind, word in _CLASSES.items() if isinstance(error, kind))
    return next(found, UNEXPECTED)


def code(error: BaseException) -> int:
    """The code of a Flower error that tells the other side the word."""
    word = of(error)
    return _FIRST + _WORDS.index(word) if word in _WORDS else _RAISED


def told(number: int) -> str:
    """The word that a Flower error's code stands for; Flower's own codes are unexpected."""
    place = number - _FIRST
    return _WORDS[place] if 0 <= place < len(_WORDS) else UNEXPECTED
