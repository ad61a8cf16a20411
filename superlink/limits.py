"""How much the enrolment service does for those whom it does not know.

A token bucket per source and one for all. What is refused is told when to come again, each a moment of its own, so that
fifty sites behind one address do not all come back in the same second.
"""

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from superlink.refused import Refused


@dataclass(frozen=True)
class Rate:
    """So many a second, and a burst after a pause."""

    per_second: float
    burst: int


# Per source and in all. Measured: a malformed request with its handshake costs the service 3 ms of one core, an honest
# enrolment 26. So strangers cost it a twentieth with requests, and a quarter with connections, from however many
# sources. A join asks twice: for the authority, and to enrol. So a laboratory of 50 sites behind one address is in
# after (100 - 30) / 5 = 14 s, rounded waits aside.
REQUESTS = Rate(5, 30), Rate(20, 100)
# Every connection counts, those of members with a certificate too; these renew once in days, and try again.
CONNECTIONS = Rate(20, 300), Rate(100, 600)
# About 1 MB of buckets. Beyond them the one that was idle longest is forgotten, that is, full again: all that forged
# sources win, and the global bucket takes it back.
MAX_SOURCES = 4096
# Nobody waits longer for the next attempt, however many came at once.
MAX_WAIT = 30


@dataclass
class _Bucket:
    """Tokens that come back at a rate, up to its burst."""

    rate: Rate
    tokens: float
    at: float
    # The last moment promised to somebody who was refused.
    promised: float = 0.0

    def refill(self, now: float) -> None:
        self.tokens = min(self.rate.burst, self.tokens + (now - self.at) * self.rate.per_second)
        self.at = now

    def wait(self, now: float) -> int:
        """Return the whole seconds until a turn that nobody else was promised."""
        self.promised = max(self.promised, now) + 1 / self.rate.per_second
        if self.promised > now + MAX_WAIT:
            self.promised = now  # beyond this, turns are handed out again from the first
            return MAX_WAIT
        return max(1, math.ceil(self.promised - now))


class Limits:
    """The buckets; ``clock`` is monotonic seconds. Safe to share between threads."""

    def __init__(
        self, source: Rate, everybody: Rate, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = source
        self._all = _Bucket(everybody, everybody.burst, clock())
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()

    def require(self, address: str) -> None:
        """Let something from this address pass, or raise ``Refused`` (busy)."""
        source = _source(address)
        with self._lock:
            now = self._clock()
            bucket = self._sources.pop(source, None)
            if bucket is None:
                bucket = _Bucket(self._rate, self._rate.burst, now)
            self._sources[source] = bucket
            if len(self._sources) > MAX_SOURCES:
                self._sources.popitem(last=False)
            bucket.refill(now)
            self._all.refill(now)
            # A refused request takes no token: knocking does not keep the door shut.
            for each in (bucket, self._all):
                if each.tokens < 1:
                    seconds = each.wait(now)
                    raise Refused(
                        "busy",
                        f"too many requests: come again in {seconds} s",
                        retry_after=seconds,
                    )
            bucket.tokens -= 1
            self._all.tokens -= 1


def _source(address: str) -> str:
    """Return what one customer of a provider has: an IPv4 address, a /64 of IPv6."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
