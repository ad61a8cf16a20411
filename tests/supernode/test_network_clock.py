"""The clock is compared with the server's, and judged by what Flower accepts."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from supernode import clock
from supernode.clock import Skew, check, measure
from tests.endpoints import Https, https


@pytest.fixture
def server() -> Iterator[Https]:
    with https(None) as running:
        yield running


@pytest.fixture
def client(server: Https) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as made:
        yield made


@pytest.mark.parametrize("skew", [0.0, -7.5, 3.0, 400.0])
def test_a_skewed_clock_is_found(server: Https, client: httpx.Client, skew: float) -> None:
    """What the server's clock is ahead, this one is behind."""
    server.skew = skew
    found = measure(client, "/v1/sites")
    assert abs(found.ahead + skew) <= found.uncertainty
    # However busy the machine, the quickest of five on loopback.
    assert 0 < found.uncertainty < 1
    assert server.asked == ["/v1/sites"] * 5


def test_the_quickest_request_says_most(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round trips of 4, 1 and 2 s, each wholly on the way to a server that is 10 s behind."""
    took = iter([4.0, 1.0, 2.0])
    now = [1000.0]

    def get(path: str) -> httpx.Response:
        now[0] += next(took)
        said = {"time": now[0] - 10.0}
        return httpx.Response(200, json=said, request=httpx.Request("GET", f"http://x{path}"))

    monkeypatch.setattr(clock, "_REQUESTS", 3)
    monkeypatch.setattr("supernode.clock.time.time", lambda: now[0])
    monkeypatch.setattr("supernode.clock.time.monotonic", lambda: now[0])
    monkeypatch.setattr(client, "get", get)
    # Half a second of the round trip is unknown: 10 s ahead is within 9.5 ± 0.5.
    assert measure(client, "/") == Skew(9.5, 0.5)


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"time": "noon"}', b'{"time": true}', b"<html>"])
def test_an_answer_without_the_time(server: Https, client: httpx.Client, body: bytes) -> None:
    server.body = body
    with pytest.raises(ValueError):  # noqa: PT011
        measure(client, "/v1/sites")


def test_a_refusal_tells_no_time(server: Https, client: httpx.Client) -> None:
    server.status = 404
    with pytest.raises(httpx.HTTPStatusError):
        measure(client, "/v1/sites")


@pytest.mark.parametrize(
    ("ahead", "uncertainty", "level", "beginning"),
    [
        (0.0, 0.002, "ok", "this machine's clock is 0.0 ms behind the SuperLink's (± 2.0 ms)"),
        (1.9, 0.01, "ok", "this machine's clock is 1.9 s ahead of the SuperLink's (± 10 ms)"),
        (
            2.1,
            0.01,
            "warning",
            "this machine's clock is 2.1 s ahead of the SuperLink's (± 10 ms); ",
        ),
        (5.1, 0.2, "warning", "this machine's clock is 5.1 s ahead of"),
        (
            5.1,
            0.05,
            "fail",
            "this machine's clock is 5.1 s ahead of the SuperLink's (± 50 ms), and ",
        ),
        (-59.0, 0.01, "ok", "this machine's clock is 59 s behind the SuperLink's"),
        (-61.0, 0.01, "warning", "this machine's clock is 61 s behind"),
        (-300.1, 0.2, "warning", "this machine's clock is 5 min behind"),
        (-301.0, 0.2, "fail", "this machine's clock is 5 min behind"),
        (86400.0 * 3, 0.2, "fail", "this machine's clock is 3.0 days ahead of"),
    ],
)
def test_what_flower_accepts(ahead: float, uncertainty: float, level: str, beginning: str) -> None:
    finding = check(Skew(ahead, uncertainty), "the SuperLink's")
    assert (finding.name, finding.level) == ("clock", level)
    assert finding.sentence.startswith(beginning), finding.sentence
    assert ("more than 5 s ahead or 300 s behind" in finding.sentence) == (level != "ok")
    assert (finding.remedy is None) == (level == "ok")
    assert finding.exit_code == (21 if level == "fail" else 0)


def test_the_limits_are_flowers(refuses: Callable[[float], bool]) -> None:
    """Flower refuses what this check fails, give or take the way, and accepts what it does not."""
    assert refuses(clock._AHEAD_SECONDS + 0.1)
    assert not refuses(clock._AHEAD_SECONDS - 0.1)
    # Behind, Flower adds its allowance for skew to what a request may take.
    assert not refuses(-clock._BEHIND_SECONDS)
    assert refuses(-clock._BEHIND_SECONDS - clock._AHEAD_SECONDS - 0.1)


@pytest.fixture
def refuses() -> Callable[[float], bool]:
    """Whether Flower's limits refuse a request whose clock is so many seconds ahead."""
    from flwr.supercore.constant import MAX_TIMESTAMP_DIFF_SECONDS, MIN_TIMESTAMP_DIFF_SECONDS

    limits: Any = (MIN_TIMESTAMP_DIFF_SECONDS, MAX_TIMESTAMP_DIFF_SECONDS)
    return lambda ahead: not limits[0] < -ahead < limits[1]
