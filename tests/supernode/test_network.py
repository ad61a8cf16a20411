"""Each way to fail on the way to a server has its own sentence, remedy and exit code."""

import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from certs.authority import Authority
from certs.contexts import anonymous_context, client_context, enrolment_server
from certs.identity import Identity, authority_directory, ensure_federation, identity_directory
from certs.roles import Role
from supernode import network
from supernode.findings import Finding
from supernode.network import Server, reached
from supernode.proxy import Proxy
from tests.endpoints import close, foreign, https, issued, listening, tunnel

TOOK = r"\d+(\.\d)? m?s"


@dataclass(frozen=True)
class Federation:
    """A federation of its own, whose certificates a test may issue and spoil."""

    pki: Path

    @property
    def authority(self) -> Authority:
        return Authority.load(authority_directory(self.pki))

    @property
    def bundle(self) -> str:
        return self.authority.bundle.decode()

    @property
    def site(self) -> Identity:
        return Identity.load(identity_directory(self.pki, Role.SITE, "site-a"), Role.SITE)

    @property
    def context(self) -> ssl.SSLContext:
        return client_context(self.site)

    def certificate(self, role: Role, name: str) -> Path:
        """Key and certificate of a holder in one file."""
        directory = identity_directory(self.pki, role, name)
        path = self.pki / f"{role}-{name}.pem"
        path.write_bytes(
            (directory / "tls.key").read_bytes() + (directory / "tls.crt").read_bytes()
        )
        return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    pki = tmp_path_factory.mktemp("network")
    assert len(list(ensure_federation(pki, "test", ["site-a"]))) == 8
    return Federation(pki)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(network, "_CONNECT_SECONDS", 1.0)


def superlink(port: int, host: str = "localhost") -> Server:
    return Server("superlink", "the SuperLink", f"{host}:{port}", "/v1/sites")


def finding_of(
    federation: Federation,
    server: Server,
    *,
    context: ssl.SSLContext | None = None,
    proxy: Proxy | None = None,
) -> Finding:
    """The finding about a server; it has a client exactly when it may be asked more."""
    made = context or federation.context
    with reached(server, made, proxy, federation.bundle) as (finding, client):
        assert (client is None) == (finding.level == "fail")
    assert finding.name == server.name
    return finding


def failed(finding: Finding, sentence: str, remedy: str, code: int) -> None:
    assert finding.level == "fail"
    assert re.fullmatch(sentence, finding.sentence), finding.sentence
    assert finding.remedy is not None
    assert remedy in finding.remedy
    assert finding.exit_code == code


def test_a_server_that_answers(federation: Federation) -> None:
    certificate = federation.certificate(Role.SUPERLINK, "superlink")
    with https(certificate, authority_directory(federation.pki) / "ca.crt") as server:
        finding = finding_of(federation, superlink(server.port))
        assert server.asked == ["/v1/sites"]
    assert (finding.level, finding.remedy, finding.exit_code) == ("ok", None, 0)
    assert re.fullmatch(
        rf"the SuperLink localhost:{server.port}: \d address(es)? in {TOOK}, TCP in {TOOK}, TLSv1.3 in {TOOK}, "
        rf"certificate good for (29\.9|30\.0) days, answer in {TOOK}",
        finding.sentence,
    ), finding.sentence


def test_the_enrolment_service_answers_without_a_certificate(federation: Federation) -> None:
    server = Server("enrolment", "the enrolment service", "", "/v1/authority")
    context = anonymous_context(federation.bundle, "test")
    with https(federation.certificate(Role.ENROLMENT, "enrolment")) as running:
        server = Server(server.name, server.what, f"localhost:{running.port}", server.path)
        assert finding_of(federation, server, context=context).level == "ok"
        assert running.asked == ["/v1/authority"]


def test_a_name_that_does_not_exist(federation: Federation) -> None:
    failed(
        finding_of(federation, superlink(9092, "superlink.invalid")),
        r"the SuperLink superlink\.invalid:9092: the name superlink\.invalid cannot be looked up: "
        rf"(there is no such name|the name server does not answer) \({TOOK}\)",
        "Compare superlink.invalid with what the federation's operator calls it",
        15,
    )


def test_a_name_server_that_is_late(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_SLOW_NAME_SECONDS", -1.0)
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as server:
        finding = finding_of(federation, superlink(server.port))
    assert (finding.level, finding.exit_code) == ("warning", 0)
    assert "/etc/resolv.conf" in (finding.remedy or "")


def test_a_closed_port(federation: Federation, free_port: Callable[[], int]) -> None:
    port = free_port()
    failed(
        finding_of(federation, superlink(port, "127.0.0.1")),
        rf"the SuperLink 127\.0\.0\.1:{port}: no TCP connection to port {port} of 127\.0\.0\.1: "
        r"127\.0\.0\.1 refuses connections",
        "Ask the federation's operator whether it runs there",
        15,
    )


@pytest.mark.parametrize(
    ("error", "why", "remedy"),
    [
        (TimeoutError("timed out"), "does not answer within 1 s", "allow outgoing TCP connections"),
        (OSError(101, "Network is unreachable"), r"cannot be reached \(no route\)", "its route"),
        (OSError(113, "No route to host"), r"cannot be reached \(no route\)", "its route"),
        (PermissionError(13, "Permission denied"), r"cannot be connected to \(\[Errno 13\].*\)", "VPN"),
    ],
)  # fmt: skip
def test_what_keeps_tcp_from_connecting(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    why: str,
    remedy: str,
) -> None:
    """No address of loopback drops packets or has no route."""

    def connect(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    failed(
        finding_of(federation, superlink(9092, "127.0.0.1")),
        rf"the SuperLink 127\.0\.0\.1:9092: no TCP connection to port 9092 of 127\.0\.0\.1: 127\.0\.0\.1 {why}",
        remedy,
        15,
    )


def test_an_address_that_lets_everybody_wait(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP client tries the addresses of a name in their order."""
    connect = socket.create_connection

    def connect_late(address: tuple[str, int], *options: Any, **named: Any) -> object:
        if address[0] == "192.0.2.1":
            raise TimeoutError("timed out")
        return connect(address, *options, **named)

    monkeypatch.setattr(socket, "create_connection", connect_late)
    monkeypatch.setattr(network, "_resolve", lambda *_: ["192.0.2.1", "127.0.0.1"])
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as server:
        finding = finding_of(federation, superlink(server.port))
    assert finding.level == "warning"
    assert "2 addresses in" in finding.sentence
    assert "after 1 address that did not answer" in finding.sentence
    assert "Have 192.0.2.1 taken out of localhost's DNS entry" in (finding.remedy or "")


def test_a_server_that_says_nothing(federation: Federation) -> None:
    with listening() as port:
        failed(
            finding_of(federation, superlink(port)),
            rf"the SuperLink localhost:{port}: accepts a TCP connection and says nothing to a TLS handshake",
            "whether it hangs",
            15,
        )


def test_a_server_that_hangs_up(federation: Federation) -> None:
    with listening(close) as port:
        failed(
            finding_of(federation, superlink(port)),
            rf"the SuperLink localhost:{port}: accepts a TCP connection and ends it in the TLS handshake, as a "
            "firewall does that blocks a name",
            "allow TLS to localhost port",
            15,
        )


def test_a_server_of_plain_http(federation: Federation) -> None:
    with https(None) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: what answers there does not speak TLS \(\w+\)",
            "a portal wants a login first",
            15,
        )


def test_somebody_who_opens_tls(federation: Federation, tmp_path: Path) -> None:
    with https(foreign(tmp_path)) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: the certificate presented there is for 'localhost', issued by "
            "'Middlebox Inspection CA' and not by the federation: a proxy or firewall on the way opens TLS, or another "
            "service has this address",
            f"exempt localhost:{server.port} from TLS inspection",
            15,
        )
        assert server.asked == []


def test_a_strangers_name_is_shown_short_and_printable(
    federation: Federation, tmp_path: Path
) -> None:
    with https(foreign(tmp_path, "\x1b[31mCA\n" + 40 * "x")) as server:
        sentence = finding_of(federation, superlink(server.port)).sentence
    assert f"issued by '?[31mCA?{40 * 'x'}' and not" in sentence


def test_another_authority_of_the_same_name(federation: Federation, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "ca", "test")
    with https(issued(tmp_path, other)) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: the certificate presented there is of "
            "spiffe://test/superlink/superlink, signed by an authority that this site does not trust",
            "whether the authority was replaced",
            10,
        )


def test_an_expired_certificate(federation: Federation, tmp_path: Path) -> None:
    late = issued(tmp_path, federation.authority, end=timedelta(seconds=-90))
    with https(late) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: its certificate expired on [\d: -]{{16}} UTC, and this machine's "
            r"clock says [\d: -]{16}",
            "renew it",
            10,
        )


def test_a_certificate_from_the_future(federation: Federation, tmp_path: Path) -> None:
    early = issued(tmp_path, federation.authority, start=timedelta(hours=1))
    with https(early) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: its certificate is valid from [\d: -]{{16}} UTC on, and this "
            r"machine's clock says [\d: -]{16}: the clock is behind",
            "time synchronisation",
            21,
        )


def test_a_certificate_for_another_host(federation: Federation, tmp_path: Path) -> None:
    elsewhere = issued(tmp_path, federation.authority, host="superlink.lab.example")
    with https(elsewhere) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: its certificate is for superlink\.lab\.example, and not for "
            "localhost",
            "--host localhost",
            10,
        )
        failed(
            finding_of(federation, superlink(server.port, "127.0.0.1")),
            rf"the SuperLink 127\.0\.0\.1:{server.port}: its certificate is for superlink\.lab\.example, and not for "
            r"127\.0\.0\.1",
            "--host 127.0.0.1",
            10,
        )


def test_a_site_that_poses_as_the_superlink(federation: Federation) -> None:
    with https(federation.certificate(Role.SITE, "site-a")) as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: its certificate is of the federation, and is refused: .*"
            "the server is spiffe://test/site/site-a; expected superlink 'superlink' of 'test'.*",
            "Compare the address",
            10,
        )
        assert server.asked == []


def test_the_superlink_at_the_enrolment_services_address(federation: Federation) -> None:
    context = client_context(federation.site, enrolment_server("test"))
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as server:
        where = Server("enrolment", "the enrolment service", f"localhost:{server.port}", "/")
        finding = finding_of(federation, where, context=context)
    failed(finding, ".*expected enrolment 'enrolment' of 'test'.*", "Compare the address", 10)


@pytest.mark.parametrize(
    ("status", "sentence", "remedy"),
    [
        (404, r"refuses this site's certificate \(status 404\)", "site list"),
        (503, "answers with status 503", "look at its log"),
    ],
)
def test_a_server_that_refuses(
    federation: Federation, status: int, sentence: str, remedy: str
) -> None:
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as server:
        server.status = status
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: {sentence}",
            remedy,
            15,
        )


def test_a_refusal_after_the_handshake(federation: Federation, tmp_path: Path) -> None:
    """In TLS 1.3 the client has ended its handshake when the server looks at its certificate."""
    other = Authority.init(tmp_path / "ca", "test")
    certificate = federation.certificate(Role.SUPERLINK, "superlink")
    with https(certificate, other.directory / "ca.crt") as server:
        failed(
            finding_of(federation, superlink(server.port)),
            rf"the SuperLink localhost:{server.port}: ends the connection after the handshake, as it does for a "
            r"certificate that is revoked \(.+\)",
            "a new invitation brings it back",
            15,
        )
        assert server.asked == []


def test_a_server_that_does_not_answer_a_request(federation: Federation) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(federation.certificate(Role.SUPERLINK, "superlink"))
    held: list[ssl.SSLSocket] = []
    with listening(lambda near: held.append(context.wrap_socket(near, server_side=True))) as port:
        failed(
            finding_of(federation, superlink(port)),
            rf"the SuperLink localhost:{port}: does not answer a request within 1 s",
            "log and load",
            15,
        )


def test_without_an_identity_the_steps_end_at_tcp(federation: Federation) -> None:
    with listening() as port, reached(superlink(port), None, None, "") as (finding, client):
        assert client is None
        assert finding.level == "warning"
        assert re.fullmatch(
            rf"the SuperLink localhost:{port}: \d address(es)? in {TOOK}, TCP in {TOOK}; "
            "TLS was not checked without the site's identity",
            finding.sentence,
        )
        assert finding.remedy == "Mend the identity, then check again."


@pytest.fixture
def through(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[object, Proxy]]:
    """A proxy that the environment names as well, for the HTTP client's own requests."""
    with tunnel() as running:
        proxy = Proxy("http", "127.0.0.1", running.port, "lab:s3cret!")
        monkeypatch.setenv("HTTPS_PROXY", f"http://lab:s3cret%21@127.0.0.1:{running.port}")
        yield running, proxy


def test_a_server_behind_a_proxy(federation: Federation, through: tuple[object, Proxy]) -> None:
    running, proxy = through
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as server:
        finding = finding_of(federation, superlink(server.port), proxy=proxy)
        assert server.asked == ["/v1/sites"]
    assert finding.level == "ok"
    assert f"proxy http://127.0.0.1:{proxy.port}, 1 address in" in finding.sentence
    assert "s3cret" not in finding.sentence
    # The steps by hand, and the HTTP client's request: by the same way, with the same password.
    assert running.asked == [(f"localhost:{server.port}", "lab:s3cret!")] * 2  # type: ignore[attr-defined]


def test_a_proxy_that_refuses(federation: Federation, through: tuple[object, Proxy]) -> None:
    running, proxy = through
    running.status = 403  # type: ignore[attr-defined]
    failed(
        finding_of(federation, superlink(9092), proxy=proxy),
        rf"the SuperLink localhost:9092: the proxy http://127\.0\.0\.1:{proxy.port} refuses to connect to "
        r"localhost:9092 \(status 403\)",
        "allow CONNECT to localhost:9092",
        15,
    )


def test_a_proxy_that_is_not_there(federation: Federation, free_port: Callable[[], int]) -> None:
    proxy = Proxy("http", "127.0.0.1", free_port())
    failed(
        finding_of(federation, superlink(9092), proxy=proxy),
        rf"the SuperLink localhost:9092: no TCP connection to the proxy http://127\.0\.0\.1:{proxy.port}: "
        r"127\.0\.0\.1 refuses connections",
        "Compare the proxy",
        15,
    )


def test_a_proxy_without_a_name(federation: Federation) -> None:
    failed(
        finding_of(federation, superlink(9092), proxy=Proxy("http", "proxy.invalid", 3128)),
        r"the SuperLink localhost:9092: the proxy's name proxy\.invalid cannot be looked up: .*",
        "Compare proxy.invalid",
        15,
    )


def test_a_proxy_that_is_none(federation: Federation) -> None:
    with listening(close) as port:
        failed(
            finding_of(federation, superlink(9092), proxy=Proxy("http", "127.0.0.1", port)),
            rf"the SuperLink localhost:9092: the proxy http://127\.0\.0\.1:{port} does not answer a CONNECT \(.*\)",
            "Compare the proxy",
            15,
        )


def test_a_proxy_spoken_to_over_tls(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are the HTTP client's, which does not trust this one."""
    with https(federation.certificate(Role.SUPERLINK, "superlink")) as running:
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{running.port}")
        proxy = Proxy("https", "127.0.0.1", running.port)
        failed(
            finding_of(federation, superlink(9092), proxy=proxy),
            r"the SuperLink localhost:9092: cannot be connected to \(.*CERTIFICATE_VERIFY_FAILED.*\)",
            "ask your network's administrator",
            15,
        )


def test_somebody_who_opens_tls_behind_a_proxy(
    federation: Federation, through: tuple[object, Proxy], tmp_path: Path
) -> None:
    with https(foreign(tmp_path)) as server:
        finding = finding_of(federation, superlink(server.port), proxy=through[1])
    assert "opens TLS" in finding.sentence
    assert finding.exit_code == 15
