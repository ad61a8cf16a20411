"""The ServerApp asks the SuperLink whether a site that is missing was revoked, and never suffers from the answer."""

import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app import registry
from certs.identity import ensure_federation, identity_directory
from certs.roles import Peer, Role

SITES = [
    {"name": "a", "node_id": "1", "status": "online", "last_heartbeat": 1.5},
    {"name": "b", "node_id": str(2**64 - 1), "status": "unregistered", "last_heartbeat": None},
    {"name": "c", "node_id": "3", "status": "offline", "last_heartbeat": 1.5},
    {"name": "d", "node_id": "4", "status": "unregistered", "last_heartbeat": 1.5},
]
GOOD = json.dumps({"time": 2.0, "sites": SITES}).encode()


@dataclass
class SuperLink:
    """A server with the SuperLink's certificate that answers what a test sets."""

    port: int = 0
    status: int = 200
    body: bytes = GOOD
    slow: threading.Event | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("federation")
    list(ensure_federation(directory, "lab", ["lab-1"]))
    return directory


def serve(stub: SuperLink, identity: Path) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.connection, ssl.SSLSocket)
            peer = Peer.of_der(self.connection.getpeercert(binary_form=True) or b"")
            stub.asked.append((self.path, peer.role))
            if stub.slow is not None:
                stub.slow.wait(30)
            self.send_response(stub.status)
            self.send_header("content-length", str(len(stub.body)))
            self.end_headers()
            self.wfile.write(stub.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity / "tls.crt", identity / "tls.key")
    context.load_verify_locations(identity / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
    stub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def superlink(
    federation: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[SuperLink]:
    """A SuperLink, and the environment that the SuperExec beside it gives its tasks."""
    stub = SuperLink()
    role, name = getattr(request, "param", (Role.SUPERLINK, "superlink"))
    server = serve(stub, identity_directory(federation, role, name))
    superexec = identity_directory(federation, Role.SUPEREXEC, "superlink")
    monkeypatch.setenv("VLAFLEET_IDENTITY", str(superexec))
    monkeypatch.setenv("VLAFLEET_RUNTIME", f"localhost:{stub.port}")
    registry._say.cache_clear()
    yield stub
    if stub.slow is not None:
        stub.slow.set()
    server.shutdown()
    server.server_close()


def test_only_those_unregistered_among_those_asked_for(superlink: SuperLink) -> None:
    assert registry.revoked([1, 3, 2**64 - 1]) == {2**64 - 1}
    assert registry.revoked({3, 5}) == set()
    assert superlink.asked == [("/v1/sites", "superexec")] * 2


def test_nothing_is_asked_for_nobody(superlink: SuperLink) -> None:
    assert registry.revoked([]) == set()
    assert superlink.asked == []


@pytest.mark.parametrize("name", ["VLAFLEET_IDENTITY", "VLAFLEET_RUNTIME"])
def test_nothing_is_asked_without_a_superexec(
    superlink: SuperLink,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv(name)
    assert registry.revoked([4]) == set()
    assert superlink.asked == []
    assert not caplog.records


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, GOOD),
        (500, b""),
        (200, b"not JSON"),
        (200, b"[]"),
        (200, b'{"sites": null}'),
        (200, b'{"sites": [{"node_id": "x", "status": "unregistered"}]}'),
        (200, b'{"sites": [{"status": "unregistered"}]}'),
        (200, b"\xff"),
    ],
)
def test_what_is_no_answer_revokes_nobody(superlink: SuperLink, status: int, body: bytes) -> None:
    superlink.status, superlink.body = status, body
    assert registry.revoked([4]) == set()
    assert superlink.asked


@pytest.mark.parametrize("superlink", [(Role.SITE, "lab-1")], indirect=True)
def test_a_site_cannot_answer_in_the_superlinks_place(superlink: SuperLink) -> None:
    assert registry.revoked([4]) == set()


def test_the_answer_is_waited_for_in_bounds(
    superlink: SuperLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "SECONDS", 0.2)
    superlink.slow = threading.Event()
    started = time.monotonic()
    assert registry.revoked([4]) == set()
    assert time.monotonic() - started < 15


def test_a_failure_is_said_once(
    superlink: SuperLink, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[object] = []
    monkeypatch.setattr(registry._log, "warning", lambda *args: said.append(args))
    monkeypatch.setenv("VLAFLEET_IDENTITY", str(tmp_path))
    for _ in range(3):
        assert registry.revoked([4]) == set()
    assert len(said) == 1
