"""The way to a server that Flower's HTTP client takes: straight, or through the proxy that the environment names.

Flower's client is httpx with its defaults, which reads ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` in either case
(https://www.python-httpx.org/environment_variables/).
"""

import base64
import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

import httpx

from certs.errors import ConnectionRefusedByFleetError
from supernode.findings import Finding, fail, ok, warning

_NAMES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
# These lead no request of ours to a proxy; but httpx reads them too, and may stumble over them.
_OTHERS = ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY")
_PORTS = {"http": 80, "https": 443}


class UnusableProxyError(Exception):
    """httpx cannot work with the proxy variables: every request of Flower's would fail."""


@dataclass(frozen=True)
class Proxy:
    """A proxy as the environment names it, with a name and password (``name:password``) where it has them."""

    scheme: str
    host: str
    port: int
    credentials: str = field(default="", repr=False)

    @property
    def authorization(self) -> str:
        """The header line that a CONNECT carries (RFC 7617), empty without a password."""
        encoded = base64.b64encode(self.credentials.encode()).decode()
        return f"Proxy-Authorization: Basic {encoded}\r\n" if self.credentials else ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


def proxy_for(address: str) -> Proxy | None:
    """Return the proxy through which httpx reaches ``host:port``, None when it goes straight.

    Raises ``UnusableProxyError`` when httpx cannot be used with this environment.
    """
    try:
        with httpx.Client(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:
            # httpx alone knows its rules for NO_PROXY; a test holds this method against its requests.
            transport = client._transport_for_url(httpx.URL(f"https://{address}"))
            straight = transport is client._transport
    except ImportError as error:
        raise UnusableProxyError("SOCKS is not supported") from error
    except (ValueError, httpx.InvalidURL) as error:
        # What is wrong may quote the whole variable, and a password with it.
        raise UnusableProxyError("one of them is not a proxy's URL or a list of hosts") from error
    if straight:
        return None
    found = getproxies()
    url = found.get("https") or found["all"]
    parts = urlsplit(url if "://" in url else f"http://{url}")
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return Proxy(
        parts.scheme,
        parts.hostname or "",
        parts.port or _PORTS.get(parts.scheme, 80),
        credentials if parts.username else "",
    )


def check(addresses: list[str], *, inherited: bool) -> Finding:
    """Say which way Flower's client takes to ``addresses`` (``host:port``).

    ``inherited`` tells whether the site's processes get this environment: containers do not.
    """
    try:
        used = {address: proxy_for(address) for address in addresses}
    except UnusableProxyError as error:
        return fail(
            "proxy",
            f"Flower's HTTP client cannot work with {_set(*_NAMES, *_OTHERS)}: {error}",
            "Name a proxy as http://host:port and hosts in NO_PROXY by name or IPv4 address, or unset these variables.",
            ConnectionRefusedByFleetError,
        )
    said = _set(*_NAMES)
    if not said:
        return ok("proxy", "no proxy is set: connections go straight to the federation")
    through = [f"{address} through {proxy}" for address, proxy in used.items() if proxy]
    if not through:
        return ok("proxy", f"{said} is set, and NO_PROXY exempts {', '.join(addresses)}")
    for address, proxy in used.items():
        network = proxy and _network_that_holds(address)
        if network:
            return warning(
                "proxy",
                f"NO_PROXY lists {network}, but Flower's HTTP client does not read networks there: "
                f"{address} is reached through {proxy}",
                f"Add {urlsplit(f'//{address}').hostname} itself to NO_PROXY.",
            )
    sentence = f"{said} is set: this machine reaches {' and '.join(through)}"
    if not inherited:
        return warning(
            "proxy",
            f"{sentence}, but the site's containers do not get this variable",
            "Where they cannot connect straight, name the proxy in ~/.docker/config.json ('proxies'), from which "
            "containers get it; where they can, unset it here and check again.",
        )
    return ok("proxy", sentence)


def _set(*names: str) -> str:
    """Return which of these variables are set."""
    return " and ".join(name for name in names if os.environ.get(name))


def _network_that_holds(address: str) -> str | None:
    """Return the network in NO_PROXY that an IP address lies in; httpx takes it for a single address."""
    try:
        host = ipaddress.ip_address(urlsplit(f"//{address}").hostname or "")
    except ValueError:
        return None
    for entry in getproxies().get("no", "").split(","):
        try:
            network = ipaddress.ip_network(entry.strip(), strict=False)
        except ValueError:
            continue
        if "/" in entry and host in network:
            return entry.strip()
    return None
