"""The limits of the anonymous paths, on a clock that the test moves."""

import heapq

import pytest

from superlink.limits import MAX_SOURCES, MAX_WAIT, REQUESTS, Limits
from superlink.refused import Refused
from tests.clock import Clock

SOURCE, EVERYBODY = REQUESTS


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def limits(clock: Clock) -> Limits:
    return Limits(*REQUESTS, clock)


def passes(limits: Limits, address: str) -> bool:
    refused = wait_of(limits, address)
    assert refused is None or 1 <= refused <= MAX_WAIT
    return refused is None


def wait_of(limits: Limits, address: str) -> int | None:
    """The seconds after which a refused address is to come again, None when it passed."""
    try:
        limits.require(address)
    except Refused as refused:
        return refused.retry_after or 0
    return None


def test_a_source_has_a_burst_and_then_a_rate(limits: Limits, clock: Clock) -> None:
    assert sum(passes(limits, "192.0.2.1") for _ in range(200)) == SOURCE.burst
    assert passes(limits, "192.0.2.2")
    clock.now += 4
    # Those refused took nothing away from what came back.
    assert sum(passes(limits, "192.0.2.1") for _ in range(200)) == 4 * SOURCE.per_second
    clock.now += 3600
    assert sum(passes(limits, "192.0.2.1") for _ in range(200)) == SOURCE.burst


def test_all_sources_together_have_a_rate(limits: Limits, clock: Clock) -> None:
    addresses = [f"198.51.{high}.{low}" for high in range(4) for low in range(250)]
    assert sum(passes(limits, address) for address in addresses) == EVERYBODY.burst
    clock.now += 2
    assert sum(passes(limits, address) for address in addresses) == 2 * EVERYBODY.per_second


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("", "not an address", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_what_one_customer_has_is_one_source(
    limits: Limits, one: str, other: str, same: bool
) -> None:
    for _ in range(SOURCE.burst):
        assert passes(limits, one)
    assert passes(limits, other) is not same


def test_forged_sources_take_bounded_memory(limits: Limits, clock: Clock) -> None:
    for number in range(3 * MAX_SOURCES):
        passes(limits, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        clock.now += 1 / EVERYBODY.per_second
    assert len(limits._sources) == MAX_SOURCES


def test_fifty_sites_behind_one_address_are_in_within_a_minute(
    limits: Limits, clock: Clock
) -> None:
    """Each asks twice, all begin at once, and each comes again when it was told to."""
    start = clock.now
    turns = [(start, site, 2) for site in range(50)]
    heapq.heapify(turns)
    refusals = 0
    while turns:
        clock.now, site, left = heapq.heappop(turns)
        wait = wait_of(limits, "203.0.113.7")
        refusals += wait is not None
        left -= wait is None
        if left:
            heapq.heappush(turns, (clock.now + (wait or 0), site, left))
    assert clock.now - start <= 30
    # A herd that all came back every second would be refused about 700 times.
    assert refusals < 200


def test_thousands_that_knock_are_still_told_a_bounded_wait(limits: Limits) -> None:
    waits = [wait_of(limits, "203.0.113.7") for _ in range(2000)]
    assert waits[: SOURCE.burst] == [None] * SOURCE.burst
    told = [wait for wait in waits[SOURCE.burst :] if wait is not None]
    assert len(told) == 2000 - SOURCE.burst
    assert (min(told), max(told)) == (1, MAX_WAIT)


def test_what_is_refused_says_why(limits: Limits) -> None:
    for _ in range(SOURCE.burst):
        limits.require("203.0.113.7")
    with pytest.raises(Refused, match="too many requests: come again in 1 s") as caught:
        limits.require("203.0.113.7")
    assert (caught.value.code, caught.value.status) == ("busy", 429)
