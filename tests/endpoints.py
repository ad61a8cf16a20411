"""What a site may find at a server's address: silence, plain HTTP, somebody's certificate, a proxy."""

import base64
import contextlib
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from certs.authority import Authority
from certs.files import load_key, pem_certificate, pem_key
from certs.roles import Role, spiffe_id, subject


def close(connection: socket.socket) -> None:
    """Handle a connection by ending it."""
    connection.close()


@contextlib.contextmanager
def listening(handle: Callable[[socket.socket], None] | None = None) -> Iterator[int]:
    """Accept connections on a port of loopback, and leave them silent or have each handled in a thread of its own."""
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                if handle is not None:
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    for connection in kept:
        connection.close()


@dataclass
class Https:
    """A running server: its port, the paths asked, and how it answers from now on."""

    port: int
    skew: float = 0.0
    status: int = 200
    body: bytes | None = None
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def https(certificate: Path | None, authority: Path | None = None) -> Iterator[Https]:
    """Answer GET with ``{"time": ...}``, over TLS with ``certificate`` (PEM, key and certificate) or without TLS.

    With an ``authority`` clients need a certificate of its.
    """
    state = Https(0)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = json.dumps({"time": time.time() + state.skew, "sites": []}).encode()
            body = body if state.body is None else state.body
            self.send_response(state.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            if authority is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(authority)
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        state.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield state
        server.shutdown()
    thread.join(10)


@dataclass
class Tunnel:
    """A running HTTP proxy: what it was asked, and the status of its answers."""

    port: int
    status: int = 200
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextlib.contextmanager
def tunnel() -> Iterator[Tunnel]:
    """Answer CONNECT by connecting to the address asked for."""
    state = Tunnel(0)

    def handle(near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = near.recv(4096)
            if not piece:
                return
            head += piece
        line, *headers = head.decode().split("\r\n")
        target = line.split()[1]
        words = [each.split()[-1] for each in headers if each.lower().startswith("proxy-auth")]
        state.asked.append((target, "".join(base64.b64decode(word).decode() for word in words)))
        near.sendall(f"HTTP/1.1 {state.status} Answer\r\nContent-Length: 0\r\n\r\n".encode())
        if state.status != 200:
            near.close()
            return
        host, _, port = target.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as far:
            back = threading.Thread(target=_pump, args=(far, near), daemon=True)
            back.start()
            _pump(near, far)
            back.join(10)

    with listening(handle) as port:
        state.port = port
        yield state


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        source.settimeout(10)
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def issued(
    directory: Path,
    authority: Authority,
    role: Role = Role.SUPERLINK,
    name: str = "superlink",
    *,
    start: timedelta = timedelta(minutes=-5),
    end: timedelta = timedelta(days=1),
    host: str = "localhost",
) -> Path:
    """A key and a certificate of any validity by a federation's authority, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifiers = [
        x509.UniformResourceIdentifier(spiffe_id(authority.federation, role, name)),
        x509.DNSName(host),
    ]
    return _signed(
        directory,
        key,
        subject(authority.federation, role, name),
        authority.certificate.subject,
        load_key(authority.directory / "ca.key"),
        (start, end),
        identifiers,
    )


def foreign(directory: Path, issuer: str = "Middlebox Inspection CA") -> Path:
    """A key and a certificate for localhost as a proxy makes that opens TLS, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in ("localhost", issuer)
    ]
    days = (timedelta(days=-1), timedelta(days=1))
    other = ec.generate_private_key(ec.SECP256R1())
    return _signed(directory, key, names[0], names[1], other, days, [x509.DNSName("localhost")])


def _signed(
    directory: Path,
    key: ec.EllipticCurvePrivateKey,
    holder: x509.Name,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    validity: tuple[timedelta, timedelta],
    names: list[x509.GeneralName],
) -> Path:
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(holder)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + validity[0])
        .not_valid_after(now + validity[1])
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    path = directory / f"{certificate.serial_number:x}.pem"
    path.write_bytes(pem_key(key) + pem_certificate(certificate))
    return path
