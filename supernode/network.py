"""The way to a server of the federation, step by step: its name, TCP, a proxy's tunnel, TLS, its first answer.

Flower's own errors say that a connection failed. An operator needs to know which firewall, which name, which
certificate; so each step is taken by hand first, by the route that Flower's client takes (``supernode/proxy.py``).
"""

import contextlib
import errno
import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import urlsplit

import httpx

from certs.errors import first_line
from supernode.findings import Finding, fail, ok, span, warning
from supernode.handshake import StepError, explain, parsed
from supernode.proxy import Proxy

# A packet crosses the earth and back in 0.4 s; a lost one is sent again after 1 s and 3 s.
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
# More addresses than this are tried by nobody.
_MAX_ADDRESSES = 4
# Each connection asks anew: a name server this slow is felt in every one.
_SLOW_NAME_SECONDS = 2.0


@dataclass(frozen=True)
class Server:
    """A server to reach: ``name`` for findings, what it is in words, ``host:port``, and a path any site may ask."""

    name: str
    what: str
    address: str
    path: str

    @property
    def host(self) -> str:
        """The name or IP address."""
        return urlsplit(f"//{self.address}").hostname or ""

    @property
    def port(self) -> int:
        """The TCP port."""
        return urlsplit(f"//{self.address}").port or 0


@contextlib.contextmanager
def reached(
    server: Server, context: ssl.SSLContext | None, proxy: Proxy | None, authorities: str
) -> Iterator[tuple[Finding, httpx.Client | None]]:
    """Take every step to ``server``; yield the finding, and a client that has had its first answer.

    Without a ``context`` the steps end at TCP. ``authorities`` is the federation's bundle, PEM, by which a certificate
    that was refused is told from another's. The client is None where a step failed or was not taken.
    """
    whose = f"{server.what} {server.address}"
    with contextlib.ExitStack() as stack:
        client = None
        try:
            steps, late = _steps(server, context, proxy, authorities)
            if context is not None:
                client = stack.enter_context(_client(server, context))
                steps.append(f"answer in {span(_ask(server, client))}")
        except StepError as error:
            client = None
            finding = fail(server.name, f"{whose}: {error.sentence}", error.remedy, error.error)
        else:
            sentence = f"{whose}: {', '.join(steps)}"
            if context is None:
                finding = warning(
                    server.name,
                    f"{sentence}; TLS was not checked without the site's identity",
                    "Mend the identity, then check again.",
                )
            elif late:
                finding = warning(server.name, sentence, late)
            else:
                finding = ok(server.name, sentence)
        yield finding, client


def _steps(
    server: Server, context: ssl.SSLContext | None, proxy: Proxy | None, authorities: str
) -> tuple[list[str], str | None]:
    """Take the steps below HTTP; return what each took, and a remedy when one was late."""
    host, port = (proxy.host, proxy.port) if proxy else (server.host, server.port)
    steps, late = [f"proxy {proxy}"] if proxy else [], None
    started = time.monotonic()
    addresses = _resolve(host, port, proxy)
    named = time.monotonic() - started
    steps.append(f"{_count(len(addresses))} in {span(named)}")
    if named > _SLOW_NAME_SECONDS:
        late = "Look at the first name server in /etc/resolv.conf: it answers late or not at all."
    connection, seconds, silent = _connect(addresses, host, port, proxy)
    steps.append(f"TCP in {span(seconds)}")
    if silent:
        steps[-1] += f" after {_count(len(silent))} that did not answer"
        late = f"Have {', '.join(silent)} taken out of {host}'s DNS entry: every connection waits for it first."
    with connection:
        if context is None or (proxy and proxy.scheme == "https"):
            # TLS within TLS is the HTTP client's to do: its answer tells.
            return steps, late
        if proxy:
            _tunnel(connection, server, proxy)
        started = time.monotonic()
        try:
            with context.wrap_socket(connection, server_hostname=server.host) as tls:
                steps.append(f"{tls.version()} in {span(time.monotonic() - started)}")
                steps.append(_until(tls))
        except OSError as error:  # ssl.SSLError and TimeoutError among them
            failed = error
        else:
            return steps, late
    raise explain(
        *(failed, server.host, server.port, authorities), lambda: _open(server, addresses, proxy)
    )


def _count(addresses: int) -> str:
    return "1 address" if addresses == 1 else f"{addresses} addresses"


def _client(server: Server, context: ssl.SSLContext) -> httpx.Client:
    return httpx.Client(
        base_url=f"https://{server.address}", verify=context, timeout=_ANSWER_SECONDS
    )


def _open(server: Server, addresses: list[str], proxy: Proxy | None) -> socket.socket:
    """Connect once more, as far as TLS."""
    host, port = (proxy.host, proxy.port) if proxy else (server.host, server.port)
    connection, _, _ = _connect(addresses, host, port, proxy)
    if proxy:
        _tunnel(connection, server, proxy)
    return connection


def _resolve(host: str, port: int, proxy: Proxy | None) -> list[str]:
    started = time.monotonic()
    whose = f"the proxy's name {host}" if proxy else f"the name {host}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        late = getattr(error, "errno", None) == socket.EAI_AGAIN
        why = "the name server does not answer" if late else "there is no such name"
        raise StepError(
            f"{whose} cannot be looked up: {why} ({span(time.monotonic() - started)})",
            f"Compare {host} with what the federation's operator calls it; if it is right, look at this machine's "
            "name server (/etc/resolv.conf).",
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _connect(
    addresses: list[str], host: str, port: int, proxy: Proxy | None
) -> tuple[socket.socket, float, list[str]]:
    """Connect to the first address that answers, as the HTTP client does; return those that let it wait before."""
    failures: dict[str, OSError] = {}
    for address in addresses[:_MAX_ADDRESSES]:
        started = time.monotonic()
        try:
            connection = socket.create_connection((address, port), _CONNECT_SECONDS)
        except OSError as error:
            failures[address] = error
            continue
        seconds = time.monotonic() - started
        connection.settimeout(_ANSWER_SECONDS)
        silent = [each for each, why in failures.items() if isinstance(why, TimeoutError)]
        return connection, seconds, silent
    whose = f"the proxy {proxy}" if proxy else f"port {port} of {host}"
    said = " and ".join(f"{address} {_why(error)}" for address, error in failures.items())
    raise StepError(
        f"no TCP connection to {whose}: {said}", _tcp_remedy(host, port, proxy, failures)
    )


def _why(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refuses connections"
    if isinstance(error, TimeoutError):
        return f"does not answer within {span(_CONNECT_SECONDS)}"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return "cannot be reached (no route)"
    return f"cannot be connected to ({first_line(error)})"


def _tcp_remedy(host: str, port: int, proxy: Proxy | None, failures: dict[str, OSError]) -> str:
    kinds = {type(error) for error in failures.values()}
    if proxy:
        return "Compare the proxy with what your network's administrator gave you."
    if kinds == {ConnectionRefusedError}:
        return "Ask the federation's operator whether it runs there and on which port."
    if TimeoutError in kinds:
        return f"Ask your network's administrator to allow outgoing TCP connections to {host} port {port}."
    return "Look at this machine's network: its address, its route, its VPN."


def _tunnel(connection: socket.socket, server: Server, proxy: Proxy) -> None:
    """Have a proxy connect to the server (RFC 9110, 9.3.6)."""
    request = f"CONNECT {server.address} HTTP/1.1\r\nHost: {server.address}\r\n"
    try:
        connection.sendall(f"{request}{proxy.authorization}\r\n".encode())
        response = http.client.HTTPResponse(connection, method="CONNECT")
        response.begin()
    except (OSError, http.client.HTTPException) as error:
        raise StepError(
            f"the proxy {proxy} does not answer a CONNECT ({first_line(error)})",
            "Compare the proxy with what your network's administrator gave you.",
        ) from error
    if response.status != HTTPStatus.OK:
        raise StepError(
            f"the proxy {proxy} refuses to connect to {server.address} (status {response.status})",
            f"Ask your network's administrator to allow CONNECT to {server.address}, or add {server.host} to "
            "NO_PROXY if it can be reached straight.",
        )


def _until(tls: ssl.SSLSocket) -> str:
    certificate = parsed(tls.getpeercert(binary_form=True))
    left = (certificate.not_valid_after_utc - datetime.now(UTC)).total_seconds()
    return f"certificate good for {span(left)}"


def _ask(server: Server, client: httpx.Client) -> float:
    """Ask for the path that every site may; return the seconds; in TLS 1.3 a refusal comes only now."""
    started = time.monotonic()
    try:
        response = client.get(server.path)
    except httpx.TimeoutException as error:
        raise StepError(
            f"does not answer a request within {span(_ANSWER_SECONDS)}",
            "Ask the federation's operator to look at its log and load.",
        ) from error
    except (httpx.ConnectError, httpx.ProxyError) as error:
        # Through a proxy that is itself spoken to over TLS these steps are the HTTP client's.
        raise StepError(
            f"cannot be connected to ({first_line(error)})",
            "Check again; through a proxy, ask your network's administrator to allow the connection.",
        ) from error
    except httpx.HTTPError as error:
        raise StepError(
            f"ends the connection after the handshake, as it does for a certificate that is revoked "
            f"({first_line(error)})",
            "Ask the federation's operator: 'vlafleet site list' shows this site's state; a new invitation brings it "
            "back.",
        ) from error
    if response.status_code == HTTPStatus.NOT_FOUND:
        raise StepError(
            "refuses this site's certificate (status 404)",
            "Ask the federation's operator: 'vlafleet site list' shows this site's state.",
        )
    if not response.is_success:
        raise StepError(
            f"answers with status {response.status_code}",
            "Ask the federation's operator to look at its log, then check again.",
        )
    return time.monotonic() - started
