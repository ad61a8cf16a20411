"""The proxy variables mean to the preflight what they mean to httpx, which is Flower's client."""

import os
from collections.abc import Iterator

import httpx
import pytest

from supernode import proxy
from supernode.proxy import Proxy, UnusableProxyError, proxy_for
from tests.endpoints import Tunnel, tunnel

LINK = "superlink.lab.example:9092"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for each in text.split():
        name, _, value = each.partition("=")
        monkeypatch.setenv(name, value)


@pytest.fixture
def running() -> Iterator[Tunnel]:
    with tunnel() as made:
        made.status = 403
        yield made


CASES = [
    # Environment, address, whether the proxy is used.
    ("", LINK, False),
    ("HTTP_PROXY=P", LINK, False),
    ("HTTPS_PROXY=P", LINK, True),
    ("https_proxy=P", LINK, True),
    ("ALL_PROXY=P", LINK, True),
    ("all_proxy=P NO_PROXY=other.example", LINK, True),
    ("HTTPS_PROXY=P NO_PROXY=*", LINK, False),
    ("HTTPS_PROXY=P NO_PROXY=lab.example", LINK, False),
    ("HTTPS_PROXY=P NO_PROXY=.lab.example", LINK, False),
    ("HTTPS_PROXY=P no_proxy=superlink.lab.example:9092", LINK, False),
    ("HTTPS_PROXY=P no_proxy=superlink.lab.example:443", LINK, True),
    ("HTTPS_PROXY=P NO_PROXY=10.1.2.3", "10.1.2.3:9092", False),
    # curl and Go read networks there; httpx does not.
    ("HTTPS_PROXY=P NO_PROXY=10.0.0.0/8", "10.1.2.3:9092", True),
    ("HTTPS_PROXY=P NO_PROXY=localhost", "localhost:9092", False),
]


@pytest.mark.parametrize(("variables", "address", "used"), CASES)
def test_the_way_is_httpxs(
    monkeypatch: pytest.MonkeyPatch, running: Tunnel, variables: str, address: str, used: bool
) -> None:
    environment(monkeypatch, variables.replace("=P", f"=http://me:secret@127.0.0.1:{running.port}"))
    expected = Proxy("http", "127.0.0.1", running.port, "me:secret") if used else None
    assert proxy_for(address) == expected
    if used:  # what goes straight ends at nobody's address
        with httpx.Client(timeout=5) as client, pytest.raises(httpx.ProxyError):
            client.get(f"https://{address}")
        assert running.asked == [(address, "me:secret")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("proxy.lab:3128", Proxy("http", "proxy.lab", 3128)),
        ("http://proxy.lab", Proxy("http", "proxy.lab", 80)),
        ("https://proxy.lab", Proxy("https", "proxy.lab", 443)),
        ("http://a%40b:c%3Ad@[::1]:8080", Proxy("http", "::1", 8080, "a@b:c:d")),
    ],
)
def test_a_proxy_is_read(monkeypatch: pytest.MonkeyPatch, value: str, expected: Proxy) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    assert proxy_for(LINK) == expected


def test_a_proxys_password_is_not_shown() -> None:
    made = Proxy("http", "proxy.lab", 3128, "me:secret")
    assert "secret" not in f"{made} {made!r}"
    assert made.authorization == "Proxy-Authorization: Basic bWU6c2VjcmV0\r\n"
    assert Proxy("http", "proxy.lab", 3128).authorization == ""


def test_no_proxy_is_the_usual_case() -> None:
    finding = proxy.check([LINK], inherited=True)
    assert (finding.name, finding.level, finding.remedy) == ("proxy", "ok", None)
    assert finding.sentence == "no proxy is set: connections go straight to the federation"


def test_a_proxy_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.lab:3128")
    finding = proxy.check(["enrol.lab.example:9093", LINK], inherited=True)
    assert finding.level == "ok"
    assert finding.sentence == (
        "HTTPS_PROXY is set: this machine reaches enrol.lab.example:9093 through http://proxy.lab:3128 and "
        "superlink.lab.example:9092 through http://proxy.lab:3128"
    )


def test_containers_do_not_get_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.lab:3128")
    finding = proxy.check([LINK], inherited=False)
    assert finding.level == "warning"
    assert finding.sentence.endswith("but the site's containers do not get this variable")
    assert "~/.docker/config.json" in (finding.remedy or "")


def test_a_proxy_that_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, "https_proxy=http://proxy.lab:3128 NO_PROXY=lab.example")
    finding = proxy.check([LINK], inherited=True)
    assert finding.level == "ok"
    assert finding.sentence == f"https_proxy is set, and NO_PROXY exempts {LINK}"


def test_a_network_in_no_proxy_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, "HTTPS_PROXY=http://proxy.lab:3128 NO_PROXY=localhost,10.0.0.0/8")
    finding = proxy.check(["10.1.2.3:9092"], inherited=True)
    assert finding.level == "warning"
    assert finding.sentence == (
        "NO_PROXY lists 10.0.0.0/8, but Flower's HTTP client does not read networks there: 10.1.2.3:9092 is reached "
        "through http://proxy.lab:3128"
    )
    assert finding.remedy == "Add 10.1.2.3 itself to NO_PROXY."


@pytest.mark.parametrize(
    ("variables", "names", "why"),
    [
        ("ALL_PROXY=socks5://me:secret@proxy.lab:1080", "ALL_PROXY", "SOCKS is not supported"),
        ("HTTP_PROXY=socks5://me:secret@proxy.lab:1080", "HTTP_PROXY", "SOCKS is not supported"),
        ("HTTPS_PROXY=ftp://me:secret@proxy.lab", "HTTPS_PROXY", "not a proxy's URL or a list"),
        (
            "HTTPS_PROXY=http://me:secret@proxy.lab:port",
            "HTTPS_PROXY",
            "not a proxy's URL or a list",
        ),
        # An IPv6 network without any proxy: httpx ends with InvalidURL.
        ("NO_PROXY=localhost,::1/128", "NO_PROXY", "not a proxy's URL or a list of hosts"),
        ("https_proxy=http://proxy.lab NO_PROXY=fe80::/10", "https_proxy and NO_PROXY", "a list"),
    ],
)
def test_variables_that_stop_flowers_client(
    monkeypatch: pytest.MonkeyPatch, variables: str, names: str, why: str
) -> None:
    environment(monkeypatch, variables)
    with pytest.raises((ImportError, ValueError, httpx.InvalidURL)):
        httpx.Client()
    with pytest.raises(UnusableProxyError):
        proxy_for(LINK)
    finding = proxy.check([LINK], inherited=True)
    assert (finding.level, finding.exit_code) == ("fail", 15)
    assert finding.sentence.startswith(f"Flower's HTTP client cannot work with {names}: ")
    assert why in finding.sentence
    assert "secret" not in f"{finding}"
    assert "http://host:port" in (finding.remedy or "")


def test_socks_is_really_not_supported() -> None:
    """Were socksio installed, the sentence would be wrong."""
    with pytest.raises(ImportError, match="socksio"):
        httpx.Client(proxy="socks5://127.0.0.1:1")
    assert "HTTPS_PROXY" not in os.environ
