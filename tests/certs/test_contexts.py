"""TLS contexts follow the identity's files, and check whom they talk to."""

import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from certs.authority import Authority
from certs.contexts import (
    anonymous_context,
    client_context,
    enrolment_server,
    expected_server,
    reload,
    unverified_context,
)
from certs.errors import CertificateError
from certs.files import write_atomic
from certs.identity import Identity, authority_directory, ensure_federation, identity_directory
from certs.roles import Role
from tests.serving import Serving, anybody, echo, renew, serving, wait_until


@pytest.fixture
def own_pki(tmp_path: Path) -> Path:
    """A PKI of the test's own, whose files may change."""
    for _ in ensure_federation(tmp_path / "pki", "test", ["site-a"]):
        pass
    return tmp_path / "pki"


@pytest.fixture
def authority(own_pki: Path) -> Authority:
    return Authority.load(authority_directory(own_pki))


@pytest.fixture
def superlink(own_pki: Path) -> Identity:
    directory = identity_directory(own_pki, Role.SUPERLINK, "superlink")
    return Identity.load(directory, Role.SUPERLINK)


@pytest.fixture
def site(own_pki: Path) -> Identity:
    return Identity.load(identity_directory(own_pki, Role.SITE, "site-a"), Role.SITE)


def shown(running: Serving, context: ssl.SSLContext) -> int:
    """The serial of the certificate that the server shows in a new handshake."""
    with (
        socket.create_connection(("localhost", running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        return x509.load_der_x509_certificate(
            tls.getpeercert(binary_form=True) or b""
        ).serial_number


def answer(running: Serving, context: ssl.SSLContext) -> str:
    """What the server answers over a new connection; ``refused`` when there is none."""
    try:
        return httpx.get(f"{running.url}/echo", verify=context, timeout=20).text
    except httpx.TransportError:
        return "refused"


@pytest.mark.parametrize("explicit", [True, False], ids=["reload", "next handshake"])
def test_a_renewed_certificate_is_used_without_a_restart(
    authority: Authority, superlink: Identity, site: Identity, explicit: bool
) -> None:
    context = client_context(site)
    with serving(superlink) as running, running.client(site) as client:
        assert shown(running, context) == superlink.peer.serial
        assert client.get("/echo").text == f"{site.peer.serial:x} 0"
        new, new_site = renew(superlink, authority), renew(site, authority)
        if explicit:
            reload(superlink)
            reload(site)
        assert shown(running, context) == new.serial_number
        # What is open goes on with what it began with; the client's next connection is the renewed holder's.
        for _ in range(3):
            assert client.get("/echo").text == f"{site.peer.serial:x} 0"
        client.get("/echo", headers={"connection": "close"})
        assert client.get("/echo").text == f"{new_site.serial_number:x} 0"


def test_no_handshake_fails_while_certificates_are_replaced(
    authority: Authority, superlink: Identity, site: Identity
) -> None:
    context = client_context(site)
    answers: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answers.append(answer(running, context))

    with serving(superlink) as running:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(25):
            before = len(answers)
            renew(superlink, authority)
            renew(site, authority)
            while len(answers) < before + 3:
                ended.wait(0.001)
        ended.set()
        for thread in threads:
            thread.join()
    assert "refused" not in answers
    assert len({*answers}) > 10, "the site's renewed certificates must have been presented"
    assert running.handshakes == []


def test_files_that_cannot_be_used_leave_the_last_good_ones(
    authority: Authority, superlink: Identity, site: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    context = client_context(site)
    with serving(superlink) as running:
        write_atomic(superlink.certificate, b"-----BEGIN CERTIFICATE-----\n")
        assert shown(running, context) == superlink.peer.serial
        assert shown(running, context) == superlink.peer.serial
        told = [one.message for one in caplog.records if "stays in use" in one.message]
        assert len(told) == 1, "each damage is told once"
        assert str(superlink.certificate) in told[0]
        write_atomic(superlink.certificate, b"other damage")
        reload(site)  # another directory's files are not its business
        with pytest.raises(CertificateError, match=r"tls\.crt is not a PEM certificate"):
            reload(superlink)
        new = renew(superlink, authority)
        assert shown(running, context) == new.serial_number


def test_a_context_needs_good_files_to_begin_with(site: Identity) -> None:
    write_atomic(site.certificate, b"")
    with pytest.raises(CertificateError, match=r"tls\.crt is not a PEM certificate"):
        client_context(site)


def test_an_authority_is_replaced_while_everybody_runs(
    authority: Authority, superlink: Identity, site: Identity, tmp_path: Path
) -> None:
    """While two are in the bundle both are trusted; the one that is taken out is not, by no new context."""
    successor = Authority.init(tmp_path / "successor", "test")
    old, new = authority.bundle.decode(), successor.bundle.decode()
    shutil.copytree(site.directory, tmp_path / "late")
    late = Identity.load(tmp_path / "late", Role.SITE)  # keeps its old certificate
    current, behind = client_context(site), client_context(late)
    with serving(superlink) as running:
        assert "refused" not in (answer(running, current), answer(running, behind))
        for identity in (superlink, site, late):
            write_atomic(identity.authority, (old + new).encode())
        assert answer(running, behind) == f"{late.peer.serial:x} 0"
        renewed = renew(superlink, successor, old + new)
        renew(site, successor, old + new)
        assert shown(running, behind) == renewed.serial_number
        assert "refused" not in (answer(running, current), answer(running, behind))
        write_atomic(superlink.authority, new.encode())
        assert answer(running, behind) == "refused"
        wait_until(lambda: running.handshakes)
        assert [reason for reason, _, _ in running.handshakes] == ["not verified"]
        assert answer(running, current) != "refused"
        # At a client's end, too: it no longer believes a server that shows an old certificate.
        assert answer(running, current) != "refused"
        write_atomic(site.authority, new.encode())
        renew(superlink, authority, old + new)
        assert shown(running, behind) != renewed.serial_number
        assert answer(running, current) == "refused"


def test_bundles_do_not_let_another_federation_in(
    superlink: Identity, site: Identity, tmp_path: Path
) -> None:
    """Same names, another key: neither the order in a bundle nor its length decides, the signature does."""
    foreign = Authority.init(tmp_path / "foreign", "test")
    shutil.copytree(site.directory, tmp_path / "stranger")
    stranger = Identity.load(tmp_path / "stranger", Role.SITE)
    renew(stranger, foreign, foreign.bundle.decode() + superlink.bundle())
    with serving(superlink) as running:
        assert answer(running, client_context(stranger)) == "refused"
        wait_until(lambda: running.handshakes)
        assert [reason for reason, _, _ in running.handshakes] == ["not verified"]


@pytest.mark.parametrize(
    ("holder", "name", "server"),
    [
        (Role.SITE, "site-a", (Role.SUPERLINK, "superlink")),
        (Role.OPERATOR, "admin", (Role.SUPERLINK, "superlink")),
        (Role.ENROLMENT, "enrolment", (Role.SUPERLINK, "superlink")),
        (Role.SUPEREXEC, "superlink", (Role.SUPERLINK, "superlink")),
        (Role.SUPEREXEC, "site-a", (Role.SITE, "site-a")),
    ],
)
def test_everybody_expects_one_server(
    identity: Callable[[Role, str], Identity],
    holder: Role,
    name: str,
    server: tuple[Role, str],
) -> None:
    assert expected_server(identity(holder, name).peer) == ("test", *server)


@pytest.mark.parametrize(("server", "name"), [(Role.SUPERLINK, "superlink"), (Role.SITE, "site-a")])
def test_only_the_enrolment_service_is_believed_to_be_it(
    identity: Callable[[Role, str], Identity], server: Role, name: str
) -> None:
    """A site's certificate serves its Runtime API; it must not collect invitations with it."""
    own = identity(server, name)
    contexts = [
        client_context(identity(Role.SITE, "site-b"), enrolment_server("test")),
        anonymous_context(own.bundle(), "test"),
    ]
    with serving(own, anonymous={"/echo": echo}) as running:
        for context in contexts:
            with pytest.raises(
                httpx.ConnectError, match="expected enrolment 'enrolment' of 'test'"
            ):
                httpx.get(f"{running.url}/echo", verify=context)


def test_a_stranger_asks_the_enrolment_service(
    identity: Callable[[Role, str], Identity], tmp_path: Path
) -> None:
    own = identity(Role.ENROLMENT, "enrolment")
    foreign = Authority.init(tmp_path / "foreign", "test").bundle.decode()
    with serving(own, anonymous={"/open": echo}) as running:
        url = f"{running.url}/open"
        assert httpx.get(url, verify=anonymous_context(own.bundle(), "test")).text == "none 0"
        assert httpx.get(url, verify=unverified_context()).text == "none 0"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url, verify=anonymous_context(foreign, "test"))
        with pytest.raises(httpx.ConnectError, match="expected enrolment 'enrolment' of 'other'"):
            httpx.get(url, verify=anonymous_context(own.bundle(), "other"))


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----", "\u20ac"])
def test_what_is_no_authority(text: str) -> None:
    with pytest.raises(CertificateError, match="the authority of 'lab' is not a PEM certificate"):
        anonymous_context(text, "lab")


def begun(running: Serving, context: ssl.SSLContext, host: str) -> int:
    """The serial of the certificate that the server shows to a client that knows it as ``host``."""
    with (
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=host) as tls,
    ):
        return x509.load_der_x509_certificate(
            tls.getpeercert(binary_form=True) or b""
        ).serial_number


@pytest.mark.parametrize("host", ["10.96.3.7", "fd00::7", "lab-7-supernode.robots.svc"])
def test_a_site_is_known_by_its_spiffe_id_alone(
    identity: Callable[[Role, str], Identity], tmp_path: Path, host: str
) -> None:
    """Its app reaches it at an address that no certificate names. Holder and authority are checked all the same."""
    app, site = identity(Role.SUPEREXEC, "site-a"), identity(Role.SITE, "site-a")
    foreign = Authority.init(tmp_path / "foreign", "test")
    shutil.copytree(site.directory, tmp_path / "stranger")
    stranger = Identity.load(tmp_path / "stranger", Role.SITE)
    renew(stranger, foreign)
    with serving(site) as running:
        assert begun(running, client_context(app), host) == site.peer.serial
    others = {
        identity(Role.SITE, "site-b"): "expected site 'site-a' of 'test'",
        identity(Role.SUPERLINK, "superlink"): "expected site 'site-a' of 'test'",
        stranger: "unable to get local issuer certificate|self-signed",
    }
    for other, reason in others.items():
        with (
            serving(other) as running,
            pytest.raises(ssl.SSLCertVerificationError, match=reason),
        ):
            begun(running, client_context(app), host)


@pytest.mark.parametrize("host", ["10.96.3.7", "lab-7-supernode.robots.svc"])
def test_every_other_server_is_known_by_its_host_name_too(
    identity: Callable[[Role, str], Identity], host: str
) -> None:
    site, enrolment = identity(Role.SITE, "site-a"), identity(Role.ENROLMENT, "enrolment")
    contexts = {
        identity(Role.SUPERLINK, "superlink"): [client_context(site)],
        enrolment: [
            client_context(site, enrolment_server("test")),
            anonymous_context(enrolment.bundle(), "test"),
        ],
    }
    for server, clients in contexts.items():
        with serving(server, anonymous={}) as running:
            for context in clients:
                assert begun(running, context, "localhost") == server.peer.serial
                with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                    begun(running, context, host)


def test_an_asyncio_client_checks_the_server_as_well(
    identity: Callable[[Role, str], Identity],
) -> None:
    """``ssl`` has one class for sockets and another for asyncio; both are checked."""
    import asyncio

    async def connect() -> None:
        context = client_context(identity(Role.SITE, "site-b"))
        await asyncio.open_connection("localhost", running.port, ssl=context)

    with (
        serving(identity(Role.SITE, "site-a"), rules={"/echo": (anybody, echo)}) as running,
        pytest.raises(ssl.SSLCertVerificationError, match="expected superlink 'superlink'"),
    ):
        asyncio.run(connect())
