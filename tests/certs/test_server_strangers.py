"""What strangers may ask of a server that answers them, and what they may hold."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from certs import server
from certs.authority import Authority
from certs.contexts import anonymous_context
from certs.guard import Receive, Scope, Send
from certs.identity import (
    Identity,
    ensure_identity,
)
from certs.roles import Role
from tests.serving import connected, echo, is_closed, serving, wait_until

Named = Callable[[Role, str], Identity]


@pytest.fixture
def enrolment(identity: Named) -> Identity:
    return identity(Role.ENROLMENT, "enrolment")


@pytest.fixture
def stranger(enrolment: Identity) -> ssl.SSLContext:
    return anonymous_context(enrolment.bundle(), "test")


REQUEST = b"GET /open HTTP/1.1\r\nhost: localhost\r\n\r\n"


OPENINGS = {
    "nothing": b"",
    "blank": b"\r\n",
    "line": b"POST /op",
    "head": b"POST /open HTTP/1.1\r\nhost: localhost\r\n",
    "body": b"POST /open HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf",
    "chunk": b"POST /open HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n",
    "afterwards": REQUEST,
}
# What keeps each of them going without ever completing a request.
DRIPS = {
    "nothing": b"\r\n",
    "blank": b"\r\n",
    "line": b"e",
    "head": b"x",
    "body": b"",
    "chunk": b"1\r\nx\r\n",
    "afterwards": b"\r\n",
}


def test_strangers_reach_open_paths_only(enrolment: Identity, stranger: ssl.SSLContext) -> None:
    with (
        serving(enrolment, anonymous={"/open": echo}) as running,
        httpx.Client(base_url=running.url, verify=stranger) as client,
    ):
        assert client.get("/open").text == "none 0"
        for path in ("/echo", "/open/", "/open/x", "/", "/health", "/metrics"):
            assert client.get(path).status_code == 404, path
        refused = {one["path"]: (one["reason"], one["role"]) for one in running.refused}
        assert refused["/echo"] == ("no certificate", "none")
        assert refused["/open/"] == ("path", "none")


def test_a_foreign_certificate_is_worse_than_none(
    enrolment: Identity, stranger: ssl.SSLContext, tmp_path: Path
) -> None:
    foreign = Authority.init(tmp_path / "foreign", "test")
    ensure_identity(foreign, tmp_path / "id", Role.OPERATOR, "admin")
    with serving(enrolment, anonymous={"/open": echo}) as running:
        assert httpx.get(f"{running.url}/open", verify=stranger).status_code == 200
        stranger.load_cert_chain(tmp_path / "id" / "tls.crt", tmp_path / "id" / "tls.key")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/open", verify=stranger)


@pytest.mark.parametrize("stage", OPENINGS)
def test_a_stranger_that_dawdles_is_cut_off(
    enrolment: Identity,
    stranger: ssl.SSLContext,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It drips: every byte is progress of a kind, and none of them buys time."""
    monkeypatch.setattr(server, "_INCOMPLETE_SECONDS", 1.0)
    with (
        serving(enrolment, anonymous={"/open": echo}) as running,
        connected(running, stranger) as connection,
    ):
        connection.sendall(OPENINGS[stage])
        ended = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(0.1):
                    connection.sendall(DRIPS[stage])

        dripping = threading.Thread(target=drip)
        dripping.start()
        assert is_closed(connection)
        ended.set()
        dripping.join()


def test_an_early_answer_buys_no_time(
    enrolment: Identity, stranger: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a request that was answered before it ended is no request."""
    monkeypatch.setattr(server, "_INCOMPLETE_SECONDS", 1.0)

    async def hasty(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    with (
        serving(enrolment, anonymous={"/open": hasty}) as running,
        connected(running, stranger) as connection,
    ):
        connection.sendall(OPENINGS["body"])
        assert b" 204 " in connection.recv(65536)
        connection.sendall(b"whole")
        connection.settimeout(4)  # before uvicorn's own limit for idle connections, 5 s
        assert is_closed(connection)


def test_a_request_that_is_served_may_take_longer(
    enrolment: Identity, stranger: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_INCOMPLETE_SECONDS", 0.2)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.5)
        await echo(scope, receive, send)

    with serving(enrolment, anonymous={"/open": slow}) as running:
        assert httpx.get(f"{running.url}/open", verify=stranger).text == "none 0"


def test_a_handshake_that_never_ends(enrolment: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_INCOMPLETE_SECONDS", 0.5)
    with (
        serving(enrolment, anonymous={"/open": echo}) as running,
        socket.create_connection(("localhost", running.port), timeout=20) as silent,
    ):
        assert is_closed(silent)
        wait_until(lambda: running.handshakes)
        assert running.handshakes[0][0] == "timeout"


def test_strangers_hold_so_many_connections_and_no_more(
    enrolment: Identity, stranger: ssl.SSLContext
) -> None:
    """In the middle of a handshake or after it; once one is gone there is room again."""
    with (
        serving(enrolment, anonymous={"/open": echo}) as running,
        contextlib.ExitStack() as stack,
    ):
        url = f"{running.url}/open"
        held = [stack.enter_context(connected(running, stranger)) for _ in range(200)]
        for _ in range(56):
            plain = socket.create_connection(("localhost", running.port), timeout=20)
            stack.enter_context(plain)
        assert not succeeds(url, stranger)
        wait_until(lambda: running.handshakes)
        assert running.handshakes == [("limit", "256 connections are open", "127.0.0.1")]
        held[0].sendall(REQUEST)
        assert b"200 OK" in held[0].recv(65536), "those who are in are served"
        held[1].close()
        wait_until(lambda: succeeds(url, stranger))


def succeeds(url: str, context: ssl.SSLContext) -> bool:
    try:
        return httpx.get(url, verify=context).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 70_000,
        b"GET /open HTTP/1.1\r\nx: " + b"y" * 70_000,
        b"GET /open HTTP/1.1\r\n" + b"x: y\r\n" * 12_000,
        b"POST /open HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + b"y" * 70_000,
    ],
    ids=["path", "header", "headers", "trailer"],
)
def test_the_head_of_a_request_is_bounded(
    enrolment: Identity, stranger: ssl.SSLContext, head: bytes
) -> None:
    with (
        serving(enrolment, anonymous={"/open": echo}) as running,
        connected(running, stranger) as connection,
    ):
        with contextlib.suppress(OSError):
            connection.sendall(head)
        connection.settimeout(10)  # before a dawdler's time is up
        assert is_closed(connection)
