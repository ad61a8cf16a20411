"""The SuperNode measures its link through the SuperLink's real endpoint and cuts messages to fit."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.contexts import client_context
from certs.identity import Identity
from certs.link import MAX_PROBE_BYTES, PATH
from certs.roles import Role
from superlink.link import link as endpoint
from supernode.link import (
    CAREFUL,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    Link,
    Transfer,
    _rate,
    measure,
    settle,
    transfer,
)
from tests.federation import Running
from tests.throttle import throttled

KIB = 1 << 10


@pytest.mark.parametrize(
    ("up", "down", "round_trip", "chunk_kib", "concurrency"),
    [
        # Loopback and campus networks: Flower's own settings, from 3.15 MB/s on (2 x 5 MiB in 10 s at a third).
        (90e6, 90e6, 0.001, 5 * KIB, 2),
        (3.2e6, 3.2e6, 0.02, 5 * KIB, 2),
        (3.1e6, 3.1e6, 0.02, 5 * KIB, 1),
        # 200 kB/s, 150 ms each way: 667 kB in flight are ten steps of 64 KiB; 0.3 s idle in 3.3 s of sending is less
        # than a tenth.
        (200e3, 200e3, 0.3, 640, 1),
        # The same link over a satellite: idle for a fifth of the time, so two halves.
        (200e3, 200e3, 0.6, 320, 2),
        # The slower direction decides, whichever it is.
        (200e3, 10e6, 0.05, 640, 1),
        (10e6, 200e3, 0.05, 640, 1),
        # Never below the least, and no two halves of it.
        (5e3, 5e3, 0.1, 64, 1),
        (25e3, 25e3, 2.0, 64, 1),
        (0.0, 0.0, 0.0, 64, 1),
    ],
)
def test_chunks_follow_the_link(
    up: float, down: float, round_trip: float, chunk_kib: int, concurrency: int
) -> None:
    assert transfer(Link(up, down, round_trip)) == Transfer(chunk_kib * KIB, concurrency)


@given(
    up=st.floats(1e3, 1e10), down=st.floats(1e3, 1e10), round_trip=st.floats(0, 5, allow_nan=False)
)
def test_chunks_pass_on_a_third_of_the_link(up: float, down: float, round_trip: float) -> None:
    chosen = transfer(Link(up, down, round_trip))
    assert MIN_CHUNK_BYTES <= chosen.chunk_bytes <= MAX_CHUNK_BYTES
    if chosen.chunk_bytes > MIN_CHUNK_BYTES:
        # Everything on its way at once, a third of the rate left: within a third of Flower's 30 s.
        assert chosen.chunk_bytes * chosen.concurrency / (min(up, down) / 3) <= 10.0 + 1e-6


def rate_of(seconds: list[float | None]) -> tuple[float, list[int]]:
    """The rate found when the transfers take these seconds (None: too long), and the sizes that were tried."""
    tried: list[int] = []
    taken = iter(seconds)

    def move(size: int) -> float:
        tried.append(size // KIB)
        spent = next(taken)
        if spent is None:
            raise httpx.WriteTimeout("too long")
        return spent

    return _rate(move), tried


def test_a_probe_grows_until_it_says_enough() -> None:
    # 64 KiB in 0.33 s are too short to trust; 256 KiB at the same pace are not.
    rate, tried = rate_of([0.33, 1.31])
    assert tried == [64, 256]
    assert rate == pytest.approx(200e3, rel=0.01)


def test_a_probe_outlasts_tcps_slow_start() -> None:
    # Each transfer is long enough and several times faster than the one before.
    rate, tried = rate_of([0.6, 0.7, 0.9, 1.2])
    assert tried == [64, 256, 1024, 4096]
    assert rate == 4096 * KIB / 1.2


def test_a_fast_link_ends_at_the_largest_probe() -> None:
    assert rate_of([0.001, 0.004, 0.01, -0.001])[1] == [64, 256, 1024, MAX_PROBE_BYTES // KIB]


def test_a_long_first_probe_is_enough() -> None:
    assert rate_of([6.5]) == (64 * KIB / 6.5, [64])


def test_a_probe_that_is_too_slow_bounds_the_rate() -> None:
    assert rate_of([None]) == (64 * KIB / 10, [64])
    assert rate_of([0.4, None]) == (256 * KIB / 10, [64, 256])
    assert transfer(Link(64 * KIB / 10, 1e9, 0.1)) == Transfer(MIN_CHUNK_BYTES, 1)


@pytest.fixture
def ask(superlink: Running) -> Iterator[Callable[..., httpx.Response]]:
    """Send a request to the endpoint as a role's holder."""
    clients: dict[Role, httpx.Client] = {}

    def send(method: str, role: Role = Role.SITE, **options: Any) -> httpx.Response:
        if role not in clients:
            names = {Role.SITE: "site-a", Role.OPERATOR: "admin", Role.MONITOR: "prometheus"}
            directory = superlink.identity(role, names.get(role, "superlink"))
            context = client_context(Identity.load(directory, role))
            clients[role] = httpx.Client(base_url=f"https://{superlink.address}", verify=context)
        return clients[role].request(method, PATH, **options)

    yield send
    for client in clients.values():
        client.close()


@pytest.mark.federation
@pytest.mark.parametrize("role", [Role.OPERATOR, Role.MONITOR, Role.SUPEREXEC, Role.SUPERLINK])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_endpoint_is_the_sites(
    ask: Callable[..., httpx.Response], role: Role, method: str
) -> None:
    assert ask(method, role).status_code == 404


@pytest.mark.federation
def test_the_endpoint_refuses_those_without_a_certificate(superlink: Running) -> None:
    assert superlink.ask(PATH, None, method="GET").refused_by_tls


@pytest.mark.federation
def test_the_endpoint_serves_what_a_probe_needs(ask: Callable[..., httpx.Response]) -> None:
    assert ask("POST", content=bytes(MAX_PROBE_BYTES)).status_code == 200
    for size in (0, 1, 100_000, MAX_PROBE_BYTES):
        answer = ask("GET", params={"bytes": size})
        assert (answer.status_code, len(answer.content)) == (200, size)


@pytest.mark.federation
@pytest.mark.parametrize(
    ("method", "options", "status"),
    [
        ("GET", {"params": {"bytes": MAX_PROBE_BYTES + 1}}, 413),
        ("GET", {"params": {"bytes": "9" * 5000}}, 400),
        ("GET", {"params": {"bytes": "-1"}}, 400),
        ("GET", {"params": {"bytes": "²"}}, 400),
        ("GET", {"params": {"size": 1}}, 400),
        ("GET", {}, 400),
        ("POST", {"content": bytes(MAX_PROBE_BYTES + 1)}, 413),
        ("PUT", {"content": b"x"}, 405),
        ("DELETE", {}, 405),
    ],
)
def test_the_endpoint_has_limits(
    ask: Callable[..., httpx.Response], method: str, options: dict[str, Any], status: int
) -> None:
    assert ask(method, **options).status_code == status
    assert ask("GET", params={"bytes": 1}).status_code == 200


def test_an_endless_upload_is_not_read_to_its_end() -> None:
    pieces = itertools.count(1)
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        next(pieces)
        return {"type": "http.request", "body": bytes(65536), "more_body": True}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(endpoint({"type": "http", "method": "POST"}, receive, send))
    assert sent[0]["status"] == 413
    assert next(pieces) == MAX_PROBE_BYTES // 65536 + 2


def test_a_peer_that_goes_ends_the_upload() -> None:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(endpoint({"type": "http", "method": "POST"}, receive, send))
    assert sent == []


@pytest.fixture
def site(superlink: Running) -> Identity:
    return Identity.load(superlink.identity(Role.SITE, "site-a"), Role.SITE)


@pytest.mark.federation
def test_a_fast_link_keeps_flowers_settings(
    superlink: Running, site: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "vlafleet.supernode"):
        link, chosen = settle(site, superlink.address)
    assert chosen == Transfer(MAX_CHUNK_BYTES, 2)
    assert link
    assert min(link.up, link.down) > 1e6
    assert f"link to {superlink.address}: " in caplog.text
    assert caplog.text.rstrip().endswith("round trip: chunks of 5 MiB, 2 at a time")


@pytest.mark.federation
def test_a_slow_link_is_measured_through_verified_tls(superlink: Running, site: Identity) -> None:
    """The certificate names localhost, not a port: the SuperLink is verified behind another one too."""
    with throttled(superlink.port) as slow:
        link = measure(site, f"localhost:{slow.port}")
        spent = slow.up + slow.down
    # A busy machine makes the link slower, nothing makes it faster.
    assert 20e3 < link.up < 1.05 * 200e3
    assert 20e3 < link.down < 1.05 * 200e3
    assert link.round_trip >= 0.3
    assert transfer(link).chunk_bytes <= 640 * KIB
    # Cheap: two probes each way, and some TLS.
    assert spent < 1e6


def unmeasured(identity: Identity, address: str, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level(logging.WARNING, "vlafleet.supernode"):
        assert settle(identity, address) == (None, CAREFUL)
    (record,) = caplog.records
    return record.getMessage()


def test_an_unreachable_superlink_leaves_careful_settings(
    identity: Callable[[Role, str], Identity],
    free_port: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = f"localhost:{free_port()}"
    line = unmeasured(identity(Role.SITE, "site-a"), address, caplog)
    assert line.startswith(f"link to {address}: not measured (")
    assert line.endswith("): chunks of 256 KiB, 1 at a time until the SuperNode is restarted")


@pytest.mark.federation
def test_a_refused_measurement_leaves_careful_settings(
    superlink: Running, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Identity.load(superlink.identity(Role.OPERATOR, "admin"), Role.OPERATOR)
    assert "(the SuperLink answered 404)" in unmeasured(stranger, superlink.address, caplog)


def test_an_address_that_is_none_is_flowers_to_refuse(
    identity: Callable[[Role, str], Identity], caplog: pytest.LogCaptureFixture
) -> None:
    assert "not measured" in unmeasured(identity(Role.SITE, "site-a"), "localhost:port", caplog)
