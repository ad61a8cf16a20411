"""uvicorn with mutual TLS: the one way a Flower API is served here."""

import asyncio
import errno
import socket
import ssl

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from certs.contexts import server_context
from certs.errors import AddressError
from certs.guard import Guard, log_refused_handshake
from certs.identity import Identity
from certs.revocations import Revocations
from certs.roles import Peer


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol that hands the verified peer to the application as ``scope["state"]["peer"]``."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the certificate once per connection."""
        super().connection_made(transport)
        ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        der = ssl_object.getpeercert(binary_form=True) if ssl_object else None
        self.app_state = {**self.app_state, "peer": Peer.of_der(der) if der else None}


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; raise ``AddressError`` with a sentence when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A restarted server takes over connections in TIME_WAIT; a second server is still refused.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"port {port} on {host} is in use by another process; stop it or choose another --port"
            ) from error
        raise AddressError(
            f"cannot listen on {host} port {port}: {error}; choose an address of this machine"
        ) from error
    return listener


def mutual_tls_server(
    guard: Guard, identity: Identity, revocations: Revocations | None
) -> uvicorn.Server:
    """Return a uvicorn server that answers TLS 1.3 clients with a certificate of this federation only."""
    context = server_context(identity, revocations, log_refused_handshake)
    return uvicorn.Server(
        uvicorn.Config(
            guard,
            ssl_context_factory=lambda _config, _default: context,
            http=PeerProtocol,
            # The loop whose transports use SSLContext.sslobject_class; uvloop does not promise to.
            loop="asyncio",
            ws="none",
            access_log=False,
            server_header=False,
            log_config=None,
            # Open connections are idle keep-alives of polling peers; waiting for them held a stop up for 20 s.
            timeout_graceful_shutdown=5,
        )
    )
