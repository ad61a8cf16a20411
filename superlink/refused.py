"""A request that the enrolment service refuses: why, in a word and in a sentence."""

from certs.enrolment import CODES

_STATUS = {
    "role": 403,
    "revoked": 403,
    "used": 409,
    "member": 409,
    "retired-key": 409,
    "expired": 410,
    "cancelled": 410,
    "too-large": 413,
    "busy": 429,
    "unavailable": 503,
}
# A name or a value that the client sent may stand in the sentence; 16 kB of it must not come back.
_MAX_DETAIL = 300


class Refused(Exception):  # noqa: N818 - what happened, not an error of ours
    """Not done: ``code`` is one of ``CODES``, ``detail`` a sentence, ``retry_after`` seconds for a busy service."""

    def __init__(self, code: str, detail: str, *, retry_after: int | None = None) -> None:
        if code not in CODES:
            raise ValueError(f"{code!r} is no reason to refuse a request")
        super().__init__(detail)
        self.code = code
        self.detail = detail if len(detail) <= _MAX_DETAIL else detail[: _MAX_DETAIL - 1] + "…"
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status."""
        return _STATUS.get(self.code, 400)
