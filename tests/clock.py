"""A clock that a test moves."""


class Clock:
    """Seconds, as ``time.time`` or ``time.monotonic`` would say them; they pass when ``now`` is changed."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
