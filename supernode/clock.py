"""How far this machine's clock is from the federation's, by which Flower accepts or refuses a site's requests."""

import time
from dataclasses import dataclass

import httpx

from certs.errors import ClockError
from supernode.findings import Finding, fail, ok, span, warning

# A SuperNode signs each request's time. The SuperLink refuses one from further ahead, or longer ago
# (flwr.common.constant: SYSTEM_TIME_TOLERANCE, and TIMESTAMP_TOLERANCE that allows for the way); a test compares.
_AHEAD_SECONDS = 5.0
_BEHIND_SECONDS = 300.0
# What a clock that nothing keeps right gains in some days: still accepted, soon not.
_AHEAD_WARNING_SECONDS = 2.0
_BEHIND_WARNING_SECONDS = 60.0
_REQUESTS = 5

_REMEDY = (
    "Switch on time synchronisation ('timedatectl set-ntp true', or chrony), then check again."
)


@dataclass(frozen=True)
class Skew:
    """Seconds by which this clock is ahead of the server's, and how wrong that may be either way."""

    ahead: float
    uncertainty: float


def measure(client: httpx.Client, path: str) -> Skew:
    """Compare clocks with a server whose answer at ``path`` has its ``time`` (seconds since 1970).

    The server read its clock somewhere within the round trip, so the quickest of several says most. Raises
    ``httpx.HTTPError`` when it does not answer, ``ValueError`` when the answer has no time.
    """
    skews = []
    for _ in range(_REQUESTS):
        # Differences of the monotonic clock: this machine's may be set while we ask.
        now, started = time.time(), time.monotonic()
        response = client.get(path).raise_for_status()
        half = (time.monotonic() - started) / 2
        skews.append(Skew(now + half - _time(response), half))
    return min(skews, key=lambda skew: skew.uncertainty)


def check(skew: Skew, whose: str) -> Finding:
    """Say whether Flower takes a site with this clock; ``whose`` names the other one."""
    ahead, behind = skew.ahead, -skew.ahead
    direction = "ahead of" if ahead > 0 else "behind"
    sentence = f"this machine's clock is {span(abs(ahead))} {direction} {whose} (± {span(skew.uncertainty)})"
    limits = "the SuperLink refuses a site more than 5 s ahead or 300 s behind"
    if ahead - skew.uncertainty > _AHEAD_SECONDS or behind - skew.uncertainty > _BEHIND_SECONDS:
        return fail("clock", f"{sentence}, and {limits}", _REMEDY, ClockError)
    if ahead > _AHEAD_WARNING_SECONDS or behind > _BEHIND_WARNING_SECONDS:
        return warning("clock", f"{sentence}; {limits}", _REMEDY)
    return ok("clock", sentence)


def _time(response: httpx.Response) -> float:
    record = response.json()
    value = record.get("time") if isinstance(record, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("the answer does not tell the time")
    return float(value)
