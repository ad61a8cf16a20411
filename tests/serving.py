"""A server of this project in this process, for the tests of TLS and guard that need no Flower."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs import authority as authority_module
from certs.authority import SERVERS, Authority
from certs.contexts import client_context
from certs.files import pem_certificate
from certs.guard import Application, Guard, Receive, Rule, Scope, Send
from certs.identity import Identity, store_identity
from certs.revocations import Revocations
from certs.roles import Role
from certs.server import bind, mutual_tls_server


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the serial of the peer (hex; ``none``) and the size of the body; also a lifespan."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    peer = scope["state"]["peer"]
    text = f"{peer.serial:x} {size}" if peer else f"none {size}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


async def anybody(_peer: object, _headers: object) -> None:
    """The rule that lets every peer pass."""


@dataclass
class Serving:
    """A running server and what it refused."""

    port: int
    refused: list[dict[str, str]] = field(default_factory=list)
    handshakes: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def client(self, identity: Identity, role: Role = Role.SUPERLINK) -> httpx.Client:
        """A client that expects the server to be of this role."""
        name = str(role)
        context = client_context(identity, (identity.peer.federation, role, name))
        return httpx.Client(base_url=self.url, verify=context, timeout=20)


@contextlib.contextmanager
def serving(
    identity: Identity,
    revocations: Revocations | None = None,
    *,
    anonymous: Mapping[str, Application] | None = None,
    rules: Mapping[str, tuple[Rule, Application]] | None = None,
) -> Iterator[Serving]:
    """Serve ``echo`` to every peer at ``/echo``; with ``anonymous`` to strangers at its paths."""
    listener = bind("127.0.0.1", 0)
    running = Serving(listener.getsockname()[1])
    guard = Guard(
        rules or {"/echo": (anybody, echo)},
        echo,
        revocations,
        anonymous=anonymous,
        on_refused=running.refused.append,
    )
    server = mutual_tls_server(
        guard,
        identity,
        revocations,
        anonymous=anonymous is not None,
        on_refused=lambda *refusal: running.handshakes.append(refusal),
    )
    server.config.timeout_graceful_shutdown = 0
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield running
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def connected(running: Serving, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """An open connection that speaks no HTTP yet."""
    with (
        socket.create_connection(("localhost", running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        yield tls


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection within the socket's time."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for a condition; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def renew(
    identity: Identity, authority: Authority, bundle: str | None = None, **options: Any
) -> x509.Certificate:
    """Replace an identity's key and certificate, as a renewal does."""
    peer, key = identity.peer, ec.generate_private_key(ec.SECP256R1())
    hosts = ["localhost"] if peer.role in SERVERS else []
    certificate = authority.issue(key.public_key(), peer.role, peer.name, hosts=hosts, **options)
    store_identity(
        identity.directory,
        key,
        pem_certificate(certificate).decode(),
        authority.bundle.decode() if bundle is None else bundle,
    )
    return certificate


def backdate(monkeypatch: pytest.MonkeyPatch, by: timedelta) -> None:
    """Let the authority sign as if it were ``by`` earlier."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Self:
            return super().now(tz) - by

    monkeypatch.setattr(authority_module, "datetime", Earlier)
