"""uvicorn with mutual TLS: the one way an API is served here.

uvicorn is handed connections instead of accepting them: so a refused handshake is known with the address it came from,
and a server that answers strangers bounds what they can hold.
"""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from typing import cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from certs.contexts import open_server_context, server_context
from certs.errors import AddressError
from certs.guard import Guard, log_refused_handshake, unfit
from certs.identity import Identity
from certs.revocations import Revocations
from certs.roles import Peer

_log = logging.getLogger("vlafleet.server")

# Gets a reason (bounded, a metric label), a sentence and the IP address of a connection that never reached HTTP.
OnRefused = Callable[[str, str, str], None]

# Flower's and our own requests carry about a kilobyte; uvicorn's parser has no bound.
_MOST_HEAD_BYTES = 32 * 1024
# Ticks of uvicorn's main loop, 0.1 s each, between two looks at the open connections.
_SWEEP_TICKS = 5
# What strangers may hold: an invited site needs one connection and a moment.
_MOST_CONNECTIONS = 256
_INCOMPLETE_SECONDS = 15.0
# Out of file descriptors, say: time for some to come free.
_ACCEPT_PAUSE_SECONDS = 1.0


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol that knows the verified peer.

    The application finds it in ``scope["state"]``: ``peer`` and its ``certificate`` (DER), both None when a server that
    answers strangers got none.
    """

    peer: Peer | None = None
    # Loop time since which no complete request is there; None while one is served.
    waiting_since: float | None = None
    # Bytes of the request under way that are not its body.
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the certificate once per connection."""
        super().connection_made(transport)
        ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        der = ssl_object.getpeercert(binary_form=True) if ssl_object else None
        self.peer = Peer.of_der(der) if der else None
        self.app_state = {**self.app_state, "peer": self.peer, "certificate": der}

    def data_received(self, data: bytes) -> None:
        """Bound what a request has beside its body."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MOST_HEAD_BYTES:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a request's body."""
        self._head_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a request."""
        self._head_bytes = 0
        if not self.cycle.response_complete:
            self.waiting_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on to the request that came meanwhile, or wait for one."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self.waiting_since = self.loop.time()


class Server(uvicorn.Server):
    """uvicorn that ends what must not stay open: connections of revoked and expired holders, and stalled strangers."""

    def __init__(
        self,
        config: uvicorn.Config,
        context: ssl.SSLContext,
        revocations: Revocations | None,
        *,
        anonymous: bool,
        on_refused: OnRefused | None,
    ) -> None:
        super().__init__(config)
        self._context = context
        self._revocations = revocations
        self._anonymous = anonymous
        self._on_refused = on_refused
        self._accepting: list[asyncio.Task[None]] = []
        self._handshakes: dict[asyncio.Task[None], PeerProtocol] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then accept connections."""
        await super().startup(sockets=[])
        if not self.started:
            return
        for listener in sockets or []:
            listener.setblocking(False)
            listener.listen(self.config.backlog)
            self._accepting.append(asyncio.create_task(self._accept(listener)))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, then let open requests end."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Look at the open connections every half second."""
        if counter % _SWEEP_TICKS == 0:
            for task in self._accepting:
                if task.done():
                    task.result()  # raises: a server that accepts nobody must not look alive
            self._sweep()
        return await super().on_tick(counter)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                _log.error("cannot accept a connection: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            held = self._established | {*self._handshakes.values()}
            if self._anonymous and len(held) >= _MOST_CONNECTIONS:
                connection.close()
                self._refuse("limit", f"{_MOST_CONNECTIONS} connections are open", address[0])
            else:
                self._take(connection, address[0])
            # An accept that need not wait does not yield; those who are connected have their turn.
            await asyncio.sleep(0)

    @property
    def _established(self) -> set[PeerProtocol]:
        # Every one was made in _take.
        return cast("set[PeerProtocol]", self.server_state.connections)

    def _take(self, connection: socket.socket, address: str) -> None:
        protocol = PeerProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        # The handshake counts: what strangers may hold is bounded as a whole.
        protocol.waiting_since = protocol.loop.time()
        task = asyncio.create_task(self._handshake(connection, address, protocol))
        self._handshakes[task] = protocol
        task.add_done_callback(self._handshakes.pop)

    async def _handshake(
        self, connection: socket.socket, address: str, protocol: PeerProtocol
    ) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=_INCOMPLETE_SECONDS if self._anonymous else None,
            )
        except ssl.SSLError as error:
            self._refuse(_reason(error), str(error), address)
        except ConnectionAbortedError as error:
            self._refuse("timeout", str(error), address)
        except OSError:
            pass  # the peer has gone

    def _refuse(self, reason: str, sentence: str, address: str) -> None:
        log_refused_handshake(reason, sentence, address)
        if self._on_refused is not None:
            self._on_refused(reason, sentence, address)

    def _sweep(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in list(self._established):
            peer, since = connection.peer, connection.waiting_since
            reason = unfit(peer, self._revocations) if peer else None
            if self._anonymous and since is not None and now - since > _INCOMPLETE_SECONDS:
                reason = reason or "no request"
            if reason is not None:
                _log.warning(
                    "closed connection: role=%s name=%s serial=%s address=%s reason=%s",
                    *(peer.role, peer.name, f"{peer.serial:x}") if peer else ("none", "-", "-"),
                    connection.client[0] if connection.client else "-",
                    reason,
                )
                connection.transport.abort()


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """Return a listening socket; raise ``AddressError`` with a sentence when the address is taken or not ours.

    ``option`` is the one that the operator chooses another port with.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where it reads that this is TCP; with it every answer waited 40 ms for
    # the peer's delayed acknowledgement (measured: 44 ms a request instead of 1).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # A restarted server takes over connections in TIME_WAIT; a second server is still refused.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"port {port} on {host} is in use by another process; stop it or choose another {option}"
            ) from error
        raise AddressError(
            f"cannot listen on {host} port {port}: {error}; choose an address of this machine"
        ) from error
    return listener


def mutual_tls_server(
    guard: Guard,
    identity: Identity,
    revocations: Revocations | None,
    *,
    anonymous: bool = False,
    on_refused: OnRefused | None = None,
) -> uvicorn.Server:
    """Return a uvicorn server that answers TLS 1.3 clients with a certificate of this federation only.

    With ``anonymous`` it also answers clients without one, at most 256 connections at once, and closes those that send
    no complete request within 15 s. An open connection ends within 2 s of its holder's revocation or expiry.
    ``on_refused`` is told of every connection that never reached HTTP.
    """
    make = open_server_context if anonymous else server_context
    config = uvicorn.Config(
        guard,
        # The loop whose transports use SSLContext.sslobject_class; uvloop does not promise to.
        loop="asyncio",
        ws="none",
        access_log=False,
        # An address that a request claims to come from is nobody's word.
        proxy_headers=False,
        server_header=False,
        log_config=None,
        # Open connections are idle keep-alives of polling peers; waiting for them held a stop up for 20 s.
        timeout_graceful_shutdown=5,
    )
    return Server(
        config,
        make(identity, revocations),
        revocations,
        anonymous=anonymous,
        on_refused=on_refused,
    )


def _reason(error: ssl.SSLError) -> str:
    """Return a bounded reason for a handshake that failed."""
    # OpenSSL's errors carry a reason; those of our own check of the holder do not.
    reason = getattr(error, "reason", None)
    if reason is None and isinstance(error, ssl.SSLCertVerificationError):
        return "certificate"
    known = {
        "peer_did_not_return_a_certificate": "no certificate",
        "certificate_verify_failed": "not verified",
        "http_request": "plain HTTP",
        "unsupported_protocol": "old TLS",
    }
    return known.get(str(reason).lower(), "handshake")
