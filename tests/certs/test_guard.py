"""The guard decides per request: role, revocation, expiry; and says whom it refused."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client import REGISTRY

from certs.guard import REFUSED, Guard, allow, client_address, unfit
from certs.roles import Peer, Role

MINUTES_OF_SKEW = 5


def peer(
    role: Role = Role.SITE, *, begins: float = -60, ends: float = 60, serial: int = 0xAB
) -> Peer:
    """A holder whose certificate was issued and ends that many minutes from now."""
    now = datetime.now(UTC)
    return Peer(
        *("test", role, "site-a", serial),
        not_before=now + timedelta(minutes=begins - MINUTES_OF_SKEW),
        not_after=now + timedelta(minutes=ends),
    )


async def served(_scope: object, _receive: object, send: Any) -> None:
    headers = [(b"x-served", b"yes")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class Asked:
    """One request to a guard: what it answered and whom it says it refused."""

    def __init__(self, holder: Peer | None, path: str, revoked: Any = None, **scope: Any) -> None:
        self.sent: list[Any] = []
        self.refused: list[dict[str, str]] = []
        sites = allow(lambda one: one.role is Role.SITE)
        guard = Guard(
            {"/v1/fleet/": (sites, served), "/exact": (sites, served)},
            served,
            revoked,
            anonymous={"/v1/fleet/open": served, "/open": served},
            on_refused=self.refused.append,
        )
        asked = {"type": "http", "path": path, "headers": [], "client": ("192.0.2.7", 4711)}

        async def send(message: Any) -> None:
            self.sent.append(message)

        async def receive() -> Any:
            raise AssertionError("the guard reads no body")

        asyncio.run(guard({**asked, "state": {"peer": holder}, **scope}, receive, send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def reason(self) -> str:
        return self.refused[0]["reason"] if self.refused else ""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return list(self.sent[0]["headers"])


@pytest.mark.parametrize(
    ("holder", "path", "reason"),
    [
        (peer(), "/v1/fleet/x", ""),
        (peer(), "/exact", ""),
        (peer(), "/exact/", "path"),
        (peer(), "/v1/fleet", "path"),
        (peer(), "/v1/control/x", "path"),
        (peer(Role.MONITOR), "/v1/fleet/x", "role"),
        (peer(ends=-0.01), "/v1/fleet/x", "expired"),
        (peer(serial=7), "/v1/fleet/x", "revoked"),
        (None, "/v1/fleet/x", "no certificate"),
        (None, "/elsewhere", "path"),
        (None, "/open", ""),
        (None, "/open/", "path"),
        (None, "/v1/fleet/open", ""),
        (peer(Role.MONITOR), "/v1/fleet/open", ""),
        (peer(ends=-0.01), "/open", "expired"),
        (peer(serial=7), "/open", "revoked"),
    ],
)
def test_who_passes(holder: Peer | None, path: str, reason: str) -> None:
    asked = Asked(holder, path, revoked={7})
    assert asked.reason == reason
    assert asked.status == (404 if reason else 200)
    assert ((b"x-served", b"yes") in asked.headers) is not bool(reason)


def test_a_refusal_says_who_where_and_why(caplog: pytest.LogCaptureFixture) -> None:
    def counted() -> list[float]:
        told = REGISTRY.get_sample_value("vlafleet_refusals_total", {"kind": "request"})
        return [REFUSED.labels("monitor", "/v1/fleet/", "role")._value.get(), told or 0.0]

    before = counted()
    with caplog.at_level(logging.WARNING):
        asked = Asked(peer(Role.MONITOR), "/v1/fleet/\n\x1b[31m")
    assert asked.refused == [
        {
            "role": "monitor",
            "name": "site-a",
            "serial": "ab",
            "path": "/v1/fleet/\n\x1b[31m",
            "reason": "role",
            "address": "192.0.2.7",
        }
    ]
    assert counted() == [value + 1 for value in before]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line.isprintable()
    assert "address=192.0.2.7 reason=role" in line


def test_labels_are_bounded() -> None:
    """A path is the peer's text; as a label each would be a series for ever."""
    for number in range(5):
        Asked(None, f"/{number}")
        Asked(peer(serial=7), f"/v1/fleet/{number}", revoked={7})
    apis = {sample.labels["api"] for sample in next(iter(REFUSED.collect())).samples}
    assert {"/v1/fleet/", "other"} <= apis
    assert not [api for api in apis if api[-1].isdigit()]


def test_a_stranger_has_no_name() -> None:
    (refused,) = Asked(None, "/v1/fleet/x").refused
    assert (refused["role"], refused["name"], refused["serial"]) == ("none", "", "")


def test_websockets_are_refused() -> None:
    asked = Asked(peer(), "/v1/fleet/x", type="websocket")
    assert asked.reason == "protocol"
    assert asked.sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("begins", "ends", "closing"),
    [(-60, 60, False), (-49, 11, False), (-51, 9, True), (-1, 1, False), (-0.9, 0.1, True)],
)
def test_answers_in_the_last_sixth_end_the_connection(
    begins: float, ends: float, closing: bool
) -> None:
    for path in ("/v1/fleet/x", "/open"):
        asked = Asked(peer(begins=begins, ends=ends), path)
        assert ((b"connection", b"close") in asked.headers) is closing
        assert (b"x-served", b"yes") in asked.headers


def test_unfit() -> None:
    assert unfit(peer(), None) is None
    assert unfit(peer(ends=-1), None) == "expired"
    assert unfit(peer(serial=7, ends=-1), {7}) == "revoked"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scope", "address"), [({"client": ("::1", 1)}, "::1"), ({"client": None}, ""), ({}, "")]
)
def test_client_address(scope: dict[str, Any], address: str) -> None:
    assert client_address(scope) == address
