"""What the server does with connections: whoever may no longer stay is cut off, and old ways are refused."""

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from certs import server
from certs.authority import Authority
from certs.contexts import anonymous_context, client_context, enrolment_server
from certs.guard import Application, Receive, Scope, Send
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    identity_directory,
)
from certs.revocations import Revocations
from certs.roles import Role
from tests.serving import backdate, connected, echo, is_closed, renew, serving, wait_until

Named = Callable[[Role, str], Identity]


@pytest.fixture
def own_pki(tmp_path: Path) -> Path:
    """A PKI of the test's own, in which holders are revoked."""
    for _ in ensure_federation(tmp_path / "pki", "test", ["site-a", "site-b"]):
        pass
    return tmp_path / "pki"


@pytest.fixture
def authority(own_pki: Path) -> Authority:
    return Authority.load(authority_directory(own_pki))


@pytest.fixture
def own(own_pki: Path) -> Callable[[Role, str], Identity]:
    return lambda role, name: Identity.load(identity_directory(own_pki, role, name), role)


@pytest.fixture
def enrolment(identity: Named) -> Identity:
    return identity(Role.ENROLMENT, "enrolment")


@pytest.fixture
def stranger(enrolment: Identity) -> ssl.SSLContext:
    return anonymous_context(enrolment.bundle(), "test")


def test_a_revoked_holder_is_cut_off_idle_or_not(authority: Authority, own: Named) -> None:
    """Nothing is asked of the server meanwhile: an evicted site's open transfer must end all the same."""
    superlink, leaver = own(Role.SUPERLINK, "superlink"), own(Role.SITE, "site-a")
    revocations = Revocations(authority.crl, superlink.authority)
    context = client_context(leaver)
    with (
        serving(superlink, revocations) as running,
        connected(running, context) as idle,
        connected(running, context) as busy,
        running.client(own(Role.SITE, "site-b")) as other,
    ):
        busy.sendall(b"POST /echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf")
        assert other.get("/echo").status_code == 200
        stays = other.get("/echo").text
        authority.revoke(Role.SITE, "site-a")
        before = time.monotonic()
        assert is_closed(idle)
        assert is_closed(busy)
        assert time.monotonic() - before < 5  # two seconds, and what a busy machine takes
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/echo", verify=context)
        wait_until(lambda: running.handshakes)
        reason, sentence, address = running.handshakes[0]
        assert (reason, address) == ("certificate", "127.0.0.1")
        assert sentence == f"the certificate {leaver.peer.serial:x} of {leaver.peer.uri} is revoked"
        assert other.get("/echo").text == stays


def test_an_expired_holder_is_cut_off(
    authority: Authority, own: Named, caplog: pytest.LogCaptureFixture
) -> None:
    site = own(Role.SITE, "site-a")
    brief = renew(site, authority, lifetime=timedelta(seconds=4))
    context = client_context(site)
    with serving(own(Role.SUPERLINK, "superlink")) as running:
        with connected(running, context) as idle:
            assert is_closed(idle)
        assert f"name=site-a serial={brief.serial_number:x}" in caplog.text
        assert "reason=expired" in caplog.text
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/echo", verify=context)
        wait_until(lambda: running.handshakes)
        assert running.handshakes[0][0] == "not verified"


def test_a_renewed_client_loses_no_request(
    authority: Authority, own: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last sixth of a certificate's life answers end the connection; the next one shows the new certificate."""
    site = own(Role.SITE, "site-a")
    with monkeypatch.context() as patched:
        backdate(patched, timedelta(minutes=51))
        old = renew(site, authority, lifetime=timedelta(hours=1))
    with serving(own(Role.SUPERLINK, "superlink")) as running, running.client(site) as client:
        answer = client.get("/echo")
        assert answer.headers["connection"] == "close"
        assert answer.text == f"{old.serial_number:x} 0"
        new = renew(site, authority)
        for _ in range(2):
            answer = client.get("/echo")
            assert answer.text == f"{new.serial_number:x} 0"
            assert "connection" not in answer.headers


def test_a_young_certificate_keeps_its_connection(
    authority: Authority, own: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Life counts from the moment of issue: five minutes before it, where validity begins, are none of it."""
    site = own(Role.SITE, "site-a")
    with monkeypatch.context() as patched:
        backdate(patched, timedelta(minutes=1))
        renew(site, authority, lifetime=timedelta(minutes=2))
    with serving(own(Role.SUPERLINK, "superlink")) as running, running.client(site) as client:
        assert "connection" not in client.get("/echo").headers


def test_holders_reach_open_paths_too_unless_revoked(authority: Authority, own: Named) -> None:
    enrolment, site = own(Role.ENROLMENT, "enrolment"), own(Role.SITE, "site-a")
    revocations = Revocations(authority.crl, enrolment.authority)
    context = client_context(site, enrolment_server("test"))
    with serving(enrolment, revocations, anonymous={"/open": echo}) as running:
        for path in ("/open", "/echo"):
            url = f"{running.url}{path}"
            assert httpx.get(url, verify=context).text == f"{site.peer.serial:x} 0"
        authority.revoke(Role.SITE, "site-a")
        wait_until(lambda: site.peer.serial in revocations)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{running.url}/open", verify=context)


@pytest.mark.parametrize("anonymous", [None, {"/open": echo}], ids=["members", "strangers"])
def test_old_tls_and_plain_http_are_refused(
    enrolment: Identity, anonymous: dict[str, Application] | None
) -> None:
    old = ssl.create_default_context(cafile=enrolment.authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with serving(enrolment, anonymous=anonymous) as running:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/open", verify=old)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://localhost:{running.port}/open")
        wait_until(lambda: len(running.handshakes) == 2)
        assert [reason for reason, _, _ in running.handshakes] == ["old TLS", "plain HTTP"]
        assert {address for _, _, address in running.handshakes} == {"127.0.0.1"}


def test_a_body_is_not_a_head(identity: Named) -> None:
    superlink, site = identity(Role.SUPERLINK, "superlink"), identity(Role.SITE, "site-a")
    body = bytes(8 << 20)
    with serving(superlink) as running, running.client(site) as client:
        for content in (body, (body[: 1 << 16] for _ in range(128))):
            assert client.post("/echo", content=content).text == f"{site.peer.serial:x} {8 << 20}"


def test_an_application_gets_the_certificate(
    enrolment: Identity, stranger: ssl.SSLContext, identity: Named
) -> None:
    seen: list[object] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["certificate"])
        await echo(scope, receive, send)

    site = identity(Role.SITE, "site-a")
    with serving(enrolment, anonymous={"/open": look}) as running:
        for context in (stranger, client_context(site, enrolment_server("test"))):
            httpx.get(f"{running.url}/open", verify=context)
    pem = site.certificate.read_text()
    assert seen == [None, ssl.PEM_cert_to_DER_cert(pem)]


def test_a_server_that_runs_out_of_files_goes_on_later(
    identity: Named, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_ACCEPT_PAUSE_SECONDS", 0.1)
    accept = asyncio.SelectorEventLoop.sock_accept
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2

    async def scarce(
        loop: asyncio.SelectorEventLoop, listener: socket.socket
    ) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return await accept(loop, listener)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", scarce)
    site = identity(Role.SITE, "site-a")
    with (
        serving(identity(Role.SUPERLINK, "superlink")) as running,
        running.client(site) as client,
    ):
        assert client.get("/echo").text == f"{site.peer.serial:x} 0"
    assert caplog.text.count("cannot accept a connection: [Errno 24] Too many open files") == 2


def test_nobody_can_claim_another_address(identity: Named) -> None:
    superlink, site = identity(Role.SUPERLINK, "superlink"), identity(Role.SITE, "site-a")
    with serving(superlink) as running, running.client(site) as client:
        client.get("/elsewhere", headers={"x-forwarded-for": "203.0.113.9"})
        assert running.refused[0]["address"] == "127.0.0.1"


def test_answers_do_not_wait_for_acknowledgements(identity: Named) -> None:
    """With Nagle's algorithm on, each took 40 ms: the second segment waited for the peer's delayed acknowledgement."""
    superlink, site = identity(Role.SUPERLINK, "superlink"), identity(Role.SITE, "site-a")
    with serving(superlink) as running, running.client(site) as client:
        client.get("/echo")
        seconds = []
        for _ in range(30):
            before = time.perf_counter()
            client.get("/echo")
            seconds.append(time.perf_counter() - before)
        assert sorted(seconds)[3] < 0.03
