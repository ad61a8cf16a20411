"""How many requests a minute the enrolment service takes from those who have no certificate.

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

# A join asks twice: for the authority, and to enrol. So a laboratory of 50 sites behind one address is in after
# (100 - 30) / 5 = 14 s, rounded waits aside.
SOURCE_RATE, SOURCE_BURST = 5.0, 30
# Measured: a malformed request with its handshake costs the service 3 ms of one core, an honest enrolment 26. So the
# former cost it a twentieth at most, from however many sources.
GLOBAL_RATE, GLOBAL_BURST = 20.0, 100
# About 1 MB of buckets. Beyond them the one that was idle longest is forgotten, that is, full again: all that forged
# sources win, and the global bucket takes it back.
MAX_SOURCES = 4096
# Nobody waits longer for the next attempt, however many came at once.
MAX_WAIT = 30


@dataclass
class _Bucket:
    """Tokens that come back at ``rate`` a second, up to ``burst``."""

    rate: float
    burst: int
    tokens: float
    at: float
    # The last moment promised to somebody who was refused.
    promised: float = 0.0

    def refill(self, now: float) -> None:
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now

    def wait(self, now: float) -> int:
        """Return the whole seconds until a turn that nobody else was promised."""
        self.promised = max(self.promised, now) + 1 / self.rate
        if self.promised > now + MAX_WAIT:
            self.promised = now  # beyond this, turns are handed out again from the first
            return MAX_WAIT
        return max(1, math.ceil(self.promised - now))


class Limits:
    """The buckets; ``clock`` is monotonic seconds. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._all = _Bucket(GLOBAL_RATE, GLOBAL_BURST, GLOBAL_BURST, clock())
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()

    def require(self, address: str) -> None:
        """Let a request of this address pass, or raise ``Refused`` (busy)."""
        source = _source(address)
        with self._lock:
            now = self._clock()
            bucket = self._sources.pop(source, None)
            if bucket is None:
                bucket = _Bucket(SOURCE_RATE, SOURCE_BURST, SOURCE_BURST, now)
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
