"""How fast the link to the SuperLink is, and how large messages are cut for it.

Flower sends a message in chunks, each an HTTP request that must be written and answered within 30 s. Its defaults, two
chunks of 5 MiB at once, never get through below about 350 kB/s. So the SuperNode measures its link when it starts, over
the same mutual TLS and the same route as Flower's own requests, and chooses chunks that pass with room to spare.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx

from certs.contexts import client_context
from certs.identity import Identity
from certs.link import MAX_PROBE_BYTES, PATH

_log = logging.getLogger("vlafleet.supernode")

# Flower's own sizes; larger chunks would only cost memory.
MAX_CHUNK_BYTES = 5 << 20
MAX_CONCURRENCY = 2
# Below this a chunk's headers, signature and round trip cost as much as its bytes; also the step between sizes.
MIN_CHUNK_BYTES = 64 << 10

# What is on its way at once may take a third of Flower's 30 s ...
_FLIGHT_SECONDS = 10.0
# ... even when the link has only a third of its measured rate left: a link is shared, and measured for seconds only.
_SPARE = 3.0
# One chunk at a time leaves the link idle for a round trip after each; beyond a tenth of the time, two halves share it.
_IDLE_SHARE = 0.1

_FIRST_PROBE_BYTES = 64 << 10
_GROWTH = 4
# A transfer this long says enough, unless it was still much faster than the one before: TCP was still speeding up.
_TRUSTED_SECONDS = 0.5
_STILL_FASTER = 1.5
# Long enough whatever came before: eight round trips of an intercontinental link.
_CERTAIN_SECONDS = 2.0
# A probe that takes longer has measured enough: the smallest chunks follow.
_PATIENCE_SECONDS = 10.0
# The least of a few round trips is the link's; the others met other work.
_ROUND_TRIPS = 3

# Random, so that no compressing tunnel on the way makes a link look faster than it is; a TLS record's size.
_PIECE = os.urandom(16 << 10)


@dataclass(frozen=True)
class Link:
    """A measured link: bytes/s towards the SuperLink and back, and the seconds of a round trip."""

    up: float
    down: float
    round_trip: float


@dataclass(frozen=True)
class Transfer:
    """How large messages cross a link: ``concurrency`` chunks of at most ``chunk_bytes`` at once."""

    chunk_bytes: int
    concurrency: int

    def __str__(self) -> str:
        return f"chunks of {_binary(self.chunk_bytes)}, {self.concurrency} at a time"


# For a link nobody could measure: passes at 26 kB/s within the third of Flower's 30 s.
CAREFUL = Transfer(256 << 10, 1)


def settle(identity: Identity, superlink: str) -> tuple[Link | None, Transfer]:
    """Measure the link to ``superlink`` (``host:port``), say so in one line; return it, and what suits it.

    A SuperLink that cannot be reached is no failure here: Flower's SuperNode tries until it can.
    """
    try:
        link = measure(identity, superlink)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _log.warning(
            "link to %s: not measured (%s): %s until the SuperNode is restarted",
            *(superlink, _reason(error), CAREFUL),
        )
        return None, CAREFUL
    chosen = transfer(link)
    _log.info(
        "link to %s: %s up, %s down, %.0f ms round trip: %s",
        *(superlink, _decimal(link.up), _decimal(link.down), link.round_trip * 1e3, chosen),
    )
    return link, chosen


def transfer(link: Link) -> Transfer:
    """Return the largest chunks that still pass when a third of the rate of the slower direction is left."""
    rate = min(link.up, link.down)
    flight = rate * _FLIGHT_SECONDS / _SPARE
    if flight >= MAX_CONCURRENCY * MAX_CHUNK_BYTES:
        return Transfer(MAX_CHUNK_BYTES, MAX_CONCURRENCY)
    whole, half = _fit(flight), _fit(flight / 2)
    idle = link.round_trip * rate > _IDLE_SHARE * whole
    return Transfer(half, 2) if idle and flight >= 2 * MIN_CHUNK_BYTES else Transfer(whole, 1)


def measure(identity: Identity, superlink: str) -> Link:
    """Measure the link; ``httpx.HTTPError`` when the SuperLink cannot be reached or refuses."""
    with httpx.Client(
        base_url=f"https://{superlink}",
        verify=client_context(identity),
        timeout=_PATIENCE_SECONDS,
    ) as client:
        _download(client, 0)  # connection and handshake
        round_trip = min(_seconds(_download, client, 0) for _ in range(_ROUND_TRIPS))
        up = _rate(lambda size: _seconds(_upload, client, size) - round_trip)
        down = _rate(lambda size: _seconds(_download, client, size) - round_trip)
    return Link(up, down, round_trip)


def _rate(seconds: Callable[[int], float]) -> float:
    """Return the bytes/s of transfers that grow until one took long enough; ``seconds`` makes one of a size."""
    size, before = _FIRST_PROBE_BYTES, 0.0
    while True:
        try:
            spent = max(
                seconds(size), 1e-3
            )  # a millisecond: on loopback a round trip may take longer
        except httpx.TimeoutException:
            return min(before or size, size / _PATIENCE_SECONDS)
        rate = size / spent
        steady = spent >= _TRUSTED_SECONDS and rate < _STILL_FASTER * before
        if size >= MAX_PROBE_BYTES or spent >= _CERTAIN_SECONDS or steady:
            return rate
        size, before = min(size * _GROWTH, MAX_PROBE_BYTES), rate


def _seconds(move: Callable[[httpx.Client, int], None], client: httpx.Client, size: int) -> float:
    started = time.monotonic()
    move(client, size)
    return time.monotonic() - started


def _upload(client: httpx.Client, size: int) -> None:
    """Send ``size`` bytes; the answer comes when the last has arrived."""
    deadline = time.monotonic() + _PATIENCE_SECONDS

    def body() -> Iterator[bytes]:
        for start in range(0, size, len(_PIECE)):
            if time.monotonic() > deadline:
                raise httpx.WriteTimeout("the probe took too long")
            yield _PIECE[: size - start]

    headers = {"content-length": str(size)}
    client.post(PATH, content=body(), headers=headers).raise_for_status()


def _download(client: httpx.Client, size: int) -> None:
    """Receive ``size`` bytes and forget them."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with client.stream("GET", PATH, params={"bytes": size}) as response:
        response.raise_for_status()
        for _ in response.iter_raw():
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the probe took too long")


def _fit(size: float) -> int:
    """Return ``size`` as a chunk size: whole steps, within the limits."""
    steps = int(size) // MIN_CHUNK_BYTES * MIN_CHUNK_BYTES
    return min(max(steps, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the SuperLink answered {error.response.status_code}"
    return str(error) or type(error).__name__


def _decimal(rate: float) -> str:
    return f"{rate / 1e6:.1f} MB/s" if rate >= 1e6 else f"{rate / 1e3:.0f} kB/s"


def _binary(size: int) -> str:
    return f"{size / (1 << 20):.3g} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
