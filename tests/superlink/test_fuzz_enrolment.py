"""What strangers can do to the enrolment service: malformed requests by the thousand, and everybody at once."""

import base64
import contextlib
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from certs.contexts import anonymous_context
from certs.enrolment import signing_request
from certs.roles import Role
from superlink.limits import CONNECTIONS
from tests.enrolling import FEDERATION, Keys, enrolment
from tests.enrolment_service import Enrolment, running_enrolment

pytestmark = pytest.mark.federation

REQUESTS = 1000
WARM_UP = 200
MAX_GROWTH = 5 << 20
Random = random.Random


@pytest.fixture
def service(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Enrolment]:
    with running_enrolment(tmp_path, free_port(), free_port()) as running:
        yield running


def resident(process: int) -> int:
    """The bytes of memory that a process holds."""
    pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Malformed:
    """Requests that no honest client sends; ``random`` decides which."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311
        self.form = Keys().application("site-c")
        other = ec.generate_private_key(ec.SECP384R1())
        self.wrong_keys = [
            public.public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            ).decode()
            for public in (
                other.public_key(),
                ed25519.Ed25519PrivateKey.generate().public_key(),
                rsa.generate_private_key(65537, 2048).public_key(),
            )
        ]
        self.wrong_curve = signing_request(other, FEDERATION, Role.SITE, "site-c")
        self.kinds = [
            *(self.noise, self.truncated, self.flipped, self.wrong_type, self.spliced_csr),
            *(self.wrong_key, self.nested, self.large, self.chunked, self.method),
            *(self.lengths, self.headers, self.no_http, self.abandoned),
        ]

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        while True:
            kind = self.random.choice(self.kinds)
            yield kind.__name__, kind()

    def body(self, **changes: Any) -> bytes:
        """An enrolment whose secret nobody was given."""
        secret = self.random.randbytes(16)
        return json.dumps(enrolment(secret, {**self.form, **changes})).encode()

    def request(self, body: bytes, method: str = "POST", path: str = "/v1/enrol") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def noise(self) -> bytes:
        return self.request(self.random.randbytes(self.random.randrange(1, 4000)))

    def truncated(self) -> bytes:
        body = self.body()
        return self.request(body[: self.random.randrange(len(body))])

    def flipped(self) -> bytes:
        body = bytearray(self.body())
        for _ in range(self.random.randint(1, 20)):
            body[self.random.randrange(len(body))] ^= 1 << self.random.randrange(8)
        return self.request(bytes(body))

    def wrong_type(self) -> bytes:
        values: list[Any] = [
            None,
            True,
            -1,
            1e308,
            [],
            {},
            "",
            "\ud800",
            "\0",
            "é" * 50,
            10**400,
            [[]],
            "A" * 9000,
        ]
        record = json.loads(self.body())
        value = self.random.choice(values)
        where = self.random.choice(["invitation", "application", *self.form])
        if where in record:
            record[where] = value
        else:
            record["application"][where] = value
        return self.request(json.dumps(record).encode())

    def spliced_csr(self) -> bytes:
        """DER that was damaged inside its PEM."""
        lines = self.form["csr"].splitlines()
        der = bytearray(base64.b64decode("".join(lines[1:-1])))
        for _ in range(self.random.randint(1, 4)):
            der[self.random.randrange(len(der))] = self.random.randrange(256)
        text = base64.b64encode(bytes(der[: self.random.randint(1, len(der))])).decode()
        return self.request(self.body(csr=f"{lines[0]}\n{text}\n{lines[-1]}\n"))

    def wrong_key(self) -> bytes:
        changes = self.random.choice(
            [
                {"node_key": self.random.choice(self.wrong_keys)},
                {"csr": self.wrong_curve},
                {"superexec_csr": self.form["csr"]},
                {"proof": base64.b64encode(self.random.randbytes(70)).decode()},
                {"proof": "?"},
                {"site": "superlink"},
                {"federation": "other"},
            ]
        )
        return self.request(self.body(**changes))

    def nested(self) -> bytes:
        opening = self.random.choice([b"[", b'{"a":', b'[{"a":'])
        return self.request(opening * (16000 // len(opening)))

    def large(self) -> bytes:
        return self.request(b" " * self.random.choice([16385, 70_000, 300_000]))

    def chunked(self) -> bytes:
        head = b"POST /v1/enrol HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        piece = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
        return (
            head
            + piece * self.random.randint(2, 10)
            + self.random.choice([b"0\r\n\r\n", b"zz\r\n\r\n"])
        )

    def method(self) -> bytes:
        method = self.random.choice(["GET", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
        path = self.random.choice(
            [
                "/v1/enrol",
                "/v1/authority/",
                "//v1/enrol",
                "/v1/%65nrol%00",
                "*",
                "/v1/enrol?x=%ff",
                "/",
            ]
        )
        return self.request(self.body(), method, path)

    def lengths(self) -> bytes:
        length = self.random.choice(
            [
                "-1",
                "1e3",
                "9" * 30,
                "0x10",
                "5, 5",
                "",
                "5\r\ncontent-length: 6",
                "+5",
                "18446744073709551617",
            ]
        )
        head = f"POST /v1/enrol HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
        return head.encode() + self.body()

    def headers(self) -> bytes:
        lines = self.random.choice(
            [
                [b"x: " + b"a" * 50_000],
                [b"x-%d: 1" % number for number in range(5000)],
                [b"transfer-encoding: chunked", b"content-length: 5"],
                [b"transfer-encoding: gzip, chunked"],
                [b"content-encoding: gzip"],
                [b"upgrade: websocket", b"connection: upgrade"],
                [b"expect: 100-continue", b"content-length: 999999"],
                [b"x\0y: \xff\xfe"],
                [b" folded"],
                [b"no colon at all"],
            ]
        )
        return b"\r\n".join(
            [b"POST /v1/enrol HTTP/1.1", b"host: x", b"connection: close", *lines, b"", b"{}"]
        )

    def no_http(self) -> bytes:
        return self.random.choice(
            [
                b"\r\n" * 2000,
                b"GET\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"POST /v1/enrol HTTP/9.9\r\n\r\n",
                b"CONNECT localhost:22 HTTP/1.1\r\nhost: x\r\n\r\n",
                b"POST http://[:::/v1/enrol HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
                self.random.randbytes(2000),
            ]
        )

    def abandoned(self) -> bytes:
        """A request that says that more will come, and then does not."""
        return self.request(self.body())[: -self.random.randint(1, 500)]


# These are valid HTTP: whoever sends them must be told.
ANSWERED = {"noise", "truncated", "flipped", "wrong_type", "spliced_csr", "wrong_key", "nested"}


# Some of these leave the service waiting, and it them.
HANGING = {"abandoned", "no_http", "headers"}


def send(port: int, tls: ssl.SSLContext, data: bytes, patience: float) -> int | None:
    """Send bytes over TLS; return the status that came back within so many seconds, None when none did."""
    received = b""
    plain = socket.create_connection(("localhost", port), timeout=20)
    # Or the request waits 40 ms for the handshake's last acknowledgement.
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with (
        tls.wrap_socket(plain, server_hostname="localhost") as connection,
        contextlib.suppress(OSError),
    ):
        with contextlib.suppress(OSError):  # the service may have answered and closed
            connection.sendall(data)
        connection.settimeout(patience)
        while piece := connection.recv(65536):
            received += piece
            if re.match(rb"HTTP/1\.\d \d{3} .*\r\n\r\n", received, re.DOTALL):
                break
    match = re.match(rb"HTTP/1\.\d (\d{3}) ", received)
    return int(match[1]) if match else None


@pytest.fixture
def unlimited(service: Enrolment) -> Enrolment:
    """The service without its limits, which would answer most of the fuzz before it is read."""
    service.stop()
    service.start("from superlink.limits import Limits; Limits.require = lambda *_: None")
    return service


def test_malformed_requests(unlimited: Enrolment) -> None:
    service = unlimited
    tls = anonymous_context(service.superlink.authority.read_text(), FEDERATION)
    malformed = iter(Malformed(5))
    answers: Counter[tuple[str, int | None]] = Counter()

    def fuzz(number: int) -> None:
        for _ in range(number):
            kind, data = next(malformed)
            patience = 0.1 if kind in HANGING else 30.0
            answers[kind, send(service.port, tls, data, patience)] += 1

    fuzz(WARM_UP)
    memory, spent = resident(service.process), cpu_seconds(service.process)
    fuzz(REQUESTS)
    growth, spent = resident(service.process) - memory, cpu_seconds(service.process) - spent
    print(f"{growth / 2**20:.1f} MiB, {1000 * spent / REQUESTS:.1f} ms of CPU a request")
    print(sorted(answers.items(), key=str))
    wrong = {
        key: count
        for key, count in answers.items()
        if (key[1] is not None and not 400 <= key[1] < 500)
        or (key[1] is None and key[0] in ANSWERED)
    }
    assert wrong == {}
    assert answers.total() == WARM_UP + REQUESTS
    assert {kind for kind, _ in answers} == {kind.__name__ for kind in Malformed(5).kinds}
    assert growth < MAX_GROWTH
    assert "Traceback" not in service.log
    # It goes on enrolling, and nobody came in meanwhile.
    assert set(service.sites()) == {"site-a", "site-b"}
    keys = Keys()
    assert service.enrol(service.invite("site-c"), keys).site == "site-c"
    assert set(service.sites()) == {"site-a", "site-b", "site-c"}


def test_bytes_that_are_no_tls(service: Enrolment) -> None:
    chance = random.Random(7)  # noqa: S311
    for data in (
        b"",
        b"\x16\x03\x01",
        b"GET / HTTP/1.1\r\n\r\n",
        *map(chance.randbytes, [10] * 50),
    ):
        with socket.create_connection(("localhost", service.port), timeout=20) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while connection.recv(4096):
                    pass
    assert "Traceback" not in service.log
    with service.client(None) as client:
        assert client.get("/v1/authority").status_code == httpx.codes.OK


def test_a_flood_of_connections(service: Enrolment) -> None:
    """From one address: what is beyond its burst is closed before TLS, and others still get in."""
    for _ in range(3 * CONNECTIONS[0].burst):
        socket.create_connection(("127.0.0.1", service.port), 20, ("127.0.0.9", 0)).close()
    with service.client(service.holder(Role.MONITOR, "prometheus")) as client:
        text = client.get("/metrics").text
    closed = re.search(r'vlafleet_failed_handshakes_total\{reason="limit"\} ([0-9.]+)', text)
    assert closed is not None
    assert float(closed[1]) > 0
    # It fills neither log.
    assert len(service.log) < 100_000
    assert len(service.events()) < 200


def test_fifty_sites_at_once(service: Enrolment) -> None:
    """All behind one address, each with a client that comes back when it is told to."""
    invitations = [service.invite(f"site-{number}") for number in range(50)]
    joined: list[str] = []
    begin = threading.Barrier(51)
    spent = cpu_seconds(service.process)

    def join(number: int) -> None:
        keys = Keys()
        begin.wait()
        joined.append(service.enrol(invitations[number], keys).site)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    begin.wait()
    started = time.monotonic()
    for thread in threads:
        thread.join()
    took, spent = time.monotonic() - started, cpu_seconds(service.process) - spent
    print(f"50 sites in {took:.1f} s, {1000 * spent / 50:.1f} ms of CPU a site")
    assert sorted(joined) == sorted(invitation.site for invitation in invitations)
    assert took < 60
    states = Counter(site["state"] for site in service.sites().values())
    assert states["registered"] == 52
    with service.client(service.holder(Role.MONITOR, "prometheus")) as client:
        text = client.get("/metrics").text
    found = re.findall(r'vlafleet_enrolments_total\{result="([a-z-]+)"\} ([0-9.]+)', text)
    results = {result: float(number) for result, number in found if float(number)}
    # Nobody met a 503; some were told to come again.
    assert results.keys() <= {"enrolled", "busy"}
    assert results["enrolled"] == 50
    assert "Traceback" not in service.log
