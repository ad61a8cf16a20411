"""Renewal: what an answer must be to be stored, when it is asked for, and what happens when none comes."""

import itertools
import logging
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.enrolment import RENEW_PATH, requested_key
from certs.errors import CertificateError, ConnectionRefusedByFleetError
from certs.files import load_certificate, load_key, pem_certificate
from certs.identity import (
    Identity,
    identity_directory,
    store_identity,
)
from certs.renewal import RENEWAL_FAILURES, Follower, pause_before_retry, renew
from certs.roles import ENROLMENT_NAME, SUPERLINK_NAME, Peer, Role
from tests.renewing import Answer, Fleet, Signer, answer
from tests.serving import Serving, anybody, backdate, serving
from tests.serving import renew as replace

HOUR = timedelta(hours=1)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.make(tmp_path / "pki")


@pytest.fixture
def site(fleet: Fleet) -> Identity:
    return fleet.identity(Role.SITE, "site-a")


@pytest.fixture
def signer(fleet: Fleet) -> Signer:
    return Signer(fleet.authority, HOUR)


@pytest.fixture
def service(fleet: Fleet, signer: Signer) -> Iterator[Serving]:
    own = fleet.identity(Role.ENROLMENT, ENROLMENT_NAME)
    with serving(own, rules={RENEW_PATH: (anybody, signer)}) as running:
        yield running


def address(service: Serving) -> str:
    return f"localhost:{service.port}"


def files(identity: Identity) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in identity.directory.iterdir()}


def certificate_of(identity: Identity) -> x509.Certificate:
    return load_certificate(identity.certificate)


def test_a_renewal_is_a_new_certificate_for_a_new_key(
    fleet: Fleet, site: Identity, signer: Signer, service: Serving
) -> None:
    key = load_key(site.key).public_key()
    renewed = renew(site, address(service))
    assert (renewed.directory, renewed.peer.uri) == (site.directory, site.peer.uri)
    assert renewed.peer.serial == signer.serials[-1] != site.peer.serial
    assert load_key(site.key).public_key() == certificate_of(site).public_key() != key
    ((peer, request),) = signer.requests
    assert peer.serial == site.peer.serial
    assert set(request) == {"csr"}
    # The certificate in hand says who asks: the next renewal is signed by the new key.
    renew(renewed, address(service))
    assert signer.requests[-1][0].serial == renewed.peer.serial


def test_clients_that_were_there_before_present_the_new_certificate(
    fleet: Fleet, site: Identity, service: Serving
) -> None:
    with (
        serving(fleet.identity(Role.SUPERLINK, SUPERLINK_NAME)) as running,
        running.client(site) as client,
    ):
        assert client.get("/echo").text == f"{site.peer.serial:x} 0"
        renewed = renew(site, address(service))
        client.get("/echo", headers={"connection": "close"})
        assert client.get("/echo").text == f"{renewed.peer.serial:x} 0"


def test_a_new_authority_is_trusted_beside_the_old(
    fleet: Fleet, site: Identity, signer: Signer, service: Serving
) -> None:
    next_ = Authority.init(fleet.directory / "next", "test").certificate
    bundle = signer.authority.bundle + pem_certificate(next_)

    def with_next(request: dict[str, str], peer: Peer) -> Answer:
        return answer(certificate=signed(signer.authority, request), authority=bundle.decode())

    signer.fault = with_next
    assert renew(site, address(service)).authorities() == [signer.authority.certificate, next_]


def signed(authority: Authority, request: dict[str, str], **changes: Any) -> str:
    """A certificate for a request of site-a, or with something else in it."""
    key = changes.pop("key", requested_key(request["csr"]))
    role, name = changes.pop("role", Role.SITE), changes.pop("name", "site-a")
    return pem_certificate(authority.issue(key, role, name, **changes)).decode()


Fault = Callable[[Authority, Authority, dict[str, str]], Answer]


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        (
            lambda own, _, request: answer(
                certificate=signed(
                    own, request, key=ec.generate_private_key(ec.SECP256R1()).public_key()
                ),
                authority=own.bundle.decode(),
            ),
            CertificateError,
            "a certificate for another key or holder",
        ),
        (
            lambda own, _, request: answer(
                certificate=signed(own, request, name="site-b"), authority=own.bundle.decode()
            ),
            CertificateError,
            "a certificate for another key or holder",
        ),
        (
            lambda own, _, request: answer(
                certificate=signed(own, request, role=Role.OPERATOR), authority=own.bundle.decode()
            ),
            CertificateError,
            "a certificate for another key or holder",
        ),
        (
            lambda own, _, request: answer(
                certificate=signed(own, request) * 2, authority=own.bundle.decode()
            ),
            CertificateError,
            "a certificate for another key or holder",
        ),
        (
            lambda _, foreign, request: answer(
                certificate=signed(foreign, request), authority=foreign.bundle.decode()
            ),
            CertificateError,
            "authorities none of which this process trusts; the file ca.crt stays",
        ),
        (
            lambda own, foreign, request: answer(
                certificate=signed(foreign, request), authority=own.bundle.decode()
            ),
            CertificateError,
            "a certificate of an unknown authority",
        ),
        (
            lambda own, _, request: answer(
                certificate=signed(own, request, lifetime=timedelta(seconds=-1)),
                authority=own.bundle.decode(),
            ),
            CertificateError,
            "UTC; correct the clock of this machine or its",
        ),
        (
            lambda own, _, __: answer(certificate="x", authority=own.bundle.decode()),
            CertificateError,
            "is not a PEM certificate",
        ),
        (
            lambda own, _, request: answer(certificate=signed(own, request), authority=""),
            CertificateError,
            "is not a PEM certificate",
        ),
        (
            lambda own, _, request: answer(certificate=signed(own, request)),
            CertificateError,
            "answered with something else than a certificate",
        ),
        (
            lambda *_: answer(certificate=1, authority=None),
            CertificateError,
            "answered with something else than a certificate",
        ),
        (
            lambda *_: (200, {}, b"\xff"),
            CertificateError,
            "answered with something else than a certificate",
        ),
        (
            lambda *_: answer(503, code="unavailable", detail="The authority's\ndisk is full."),
            ConnectionRefusedByFleetError,
            r"refuses to renew the certificate \(503\): The authority's disk is full\.",
        ),
        (
            lambda *_: (502, {}, b"<html>"),
            ConnectionRefusedByFleetError,
            r"refuses to renew the certificate \(502\): no reason given",
        ),
        (
            # Following it would show the certificate, and a fresh key's request, to somebody else.
            lambda *_: (302, {"location": "https://localhost:1/"}, b""),
            ConnectionRefusedByFleetError,
            r"refuses to renew the certificate \(302\)",
        ),
    ],
)
def test_no_other_answer_is_stored(
    fleet: Fleet,
    site: Identity,
    signer: Signer,
    service: Serving,
    tmp_path: Path,
    fault: Fault,
    error: type[Exception],
    sentence: str,
) -> None:
    foreign = Authority.init(tmp_path / "foreign", "test")
    signer.fault = lambda request, _peer: fault(signer.authority, foreign, request)
    before = files(site)
    with pytest.raises(error, match=sentence) as raised:
        renew(site, address(service))
    assert address(service) in str(raised.value)
    assert files(site) == before


def test_what_could_not_be_kept_is_not_asked_for(
    site: Identity, signer: Signer, service: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("certs.renewal.os.access", lambda path, _mode: path != site.directory)
    with pytest.raises(CertificateError, match="cannot be written, so nothing is renewed; mount"):
        renew(site, address(service))
    assert signer.requests == []


def test_nobody_answers(site: Identity, free_port: Callable[[], int]) -> None:
    port = free_port()
    with pytest.raises(
        ConnectionRefusedByFleetError,
        match=rf"localhost:{port} does not renew certificates \(.*Connection refused\); check",
    ):
        renew(site, f"localhost:{port}")


@pytest.mark.parametrize("wrong", ["not a port", "host:port:", ""])
def test_no_address(site: Identity, wrong: str) -> None:
    with pytest.raises(ConnectionRefusedByFleetError, match="does not renew certificates"):
        renew(site, wrong)


def test_only_the_enrolment_service_is_asked(fleet: Fleet, signer: Signer, site: Identity) -> None:
    """Another site's SuperNode, whose certificate also serves, learns nothing."""
    other = fleet.identity(Role.SITE, "site-b")
    with (
        serving(other, rules={RENEW_PATH: (anybody, signer)}) as running,
        pytest.raises(
            ConnectionRefusedByFleetError,
            match=r"the server is spiffe://test/site/site-b; expected",
        ),
    ):
        renew(site, address(running))
    assert signer.requests == []


@pytest.mark.parametrize("role", [Role.OPERATOR, Role.MONITOR, Role.SUPERLINK, Role.SUPEREXEC])
def test_everybody_renews(fleet: Fleet, signer: Signer, service: Serving, role: Role) -> None:
    names = {Role.OPERATOR: "admin", Role.MONITOR: "prometheus"}
    own = fleet.identity(role, names.get(role, SUPERLINK_NAME))
    assert renew(own, address(service)).peer.serial == signer.serials[-1]


@pytest.mark.parametrize(
    ("life", "tries", "first_minute"),
    [
        (timedelta(seconds=60), range(8, 20), range(8, 20)),
        (timedelta(hours=1), range(20, 200), range(5, 9)),
        (timedelta(days=7), range(220, 300), range(5, 9)),
    ],
)
def test_an_outage_is_neither_given_up_nor_hammered(
    life: timedelta, tries: range, first_minute: range
) -> None:
    """Every try from two thirds of a life to its end fails at once."""
    now, end, times = 2 * life / 3, life, []
    while now < end:
        times.append(now - 2 * life / 3)
        now += pause_before_retry(end - now, len(times))
    assert len(times) in tries
    assert sum(time < timedelta(minutes=1) for time in times) in first_minute
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert min(pauses) >= timedelta(seconds=1)
    assert max(pauses) <= timedelta(minutes=15)


@pytest.fixture
def lived(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Identity]:
    """Return the identity of site-a with a certificate of an hour of which a share has passed."""

    def make(share: float) -> Identity:
        with monkeypatch.context() as patch:
            backdate(patch, HOUR * share)
            site = fleet.identity(Role.SITE, "site-a")
            replace(site, fleet.authority, lifetime=HOUR)
        return Identity.load(site.directory, Role.SITE) if share < 1 else site

    return make


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_it_is_renewed_at_two_thirds_of_its_life(
    lived: Callable[[float], Identity],
    signer: Signer,
    service: Serving,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for share, asked in ((0.0, 0), (0.66, 0), (0.67, 1), (0.99, 2)):
        follower = Follower(lived(share), address(service))
        follower.look()
        follower.look()
        assert len(signer.requests) == asked, share
    renewed = [line for line in said(caplog, logging.INFO) if line.startswith("renewed: ")]
    assert len(renewed) == 2
    assert f"{signer.serials[-1]:x} of spiffe://test/site/site-a ends at 20" in renewed[-1]
    assert "PRIVATE" not in caplog.text


def test_a_failure_is_said_and_tried_again(
    lived: Callable[[float], Identity],
    signer: Signer,
    service: Serving,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signer.fault = lambda _request, _peer: answer(503, code="unavailable", detail="Busy.")
    follower = Follower(lived(0.7), address(service))
    counted = RENEWAL_FAILURES.labels(Role.SITE)._value.get()
    now = 0.0
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("certs.renewal.time", clock)
    monkeypatch.setattr("certs.renewal.random.uniform", lambda _low, _high: 1.0)
    for now in (0.0, 0.9, 1.0, 2.9, 3.0, 6.9, 7.0):  # noqa: B007
        follower.look()
    assert len(signer.requests) == 4
    assert RENEWAL_FAILURES.labels(Role.SITE)._value.get() == counted + 4
    assert [line.split(": ")[0] for line in said(caplog, logging.WARNING)] == [
        f"not renewed, tried again in {seconds} s" for seconds in (1, 2, 4, 8)
    ]
    assert said(caplog, logging.WARNING)[0].endswith("(503): Busy.")
    signer.fault = lambda _request, _peer: None
    now = 15.0
    follower.look()
    assert signer.serials
    assert len(said(caplog, logging.WARNING)) == 4


def test_a_service_whose_clock_is_behind_is_not_hammered(
    lived: Callable[[float], Identity],
    signer: Signer,
    service: Serving,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it signs is due at once."""
    follower = Follower(lived(0.7), address(service))
    backdate(monkeypatch, HOUR * 0.8)
    for _ in range(5):
        follower.look()
    assert len(signer.requests) == 1


@pytest.mark.parametrize(("followed", "early", "late"), [(False, 0.7, 0.76), (True, 0.8, 0.84)])
def test_the_end_is_warned_of_once(
    lived: Callable[[float], Identity],
    free_port: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
    followed: bool,
    early: float,
    late: float,
) -> None:
    address = f"localhost:{free_port()}" if followed else None
    Follower(lived(early), address).look()
    assert said(caplog, logging.ERROR) == []
    follower = Follower(lived(late), address)
    for _ in range(3):
        follower.look()
    (line,) = said(caplog, logging.ERROR)
    assert "after that nobody lets this process in" in line
    assert (address or "issue it again, or renew it") in line


def test_an_expired_certificate_asks_nobody(
    fleet: Fleet, service: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be turned away every few seconds for ever; a fresh one in its place is taken over."""
    site = fleet.identity(Role.SITE, "site-a")
    key = load_key(site.key).public_key()
    expired = fleet.authority.issue(key, Role.SITE, "site-a", lifetime=timedelta(seconds=-1))
    site.certificate.write_bytes(pem_certificate(expired))
    gone = Identity(site.directory, Peer.of(expired), expired.not_valid_after_utc)
    follower = Follower(gone, address(service))
    for _ in range(3):
        follower.look()
    assert service.handshakes == []
    assert said(caplog, logging.WARNING) == []
    stays, ended = said(caplog, logging.ERROR)
    assert stays.startswith("the certificate in use stays: ")
    assert "after that nobody lets this process in" in ended
    caplog.set_level(logging.INFO)
    new = replace(site, fleet.authority)
    follower.look()
    assert f"{new.serial_number:x} of" in said(caplog, logging.INFO)[-1]


def test_files_that_somebody_else_replaced_are_taken_over(
    fleet: Fleet, site: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    follower = Follower(site, None)
    follower.look()
    assert said(caplog, logging.INFO) == []
    new = replace(site, fleet.authority)
    with (
        serving(fleet.identity(Role.SUPERLINK, SUPERLINK_NAME)) as running,
        running.client(site) as client,
    ):
        follower.look()
        assert client.get("/echo").text == f"{new.serial_number:x} 0"
    (line,) = [said for said in said(caplog, logging.INFO) if said.startswith("replaced: ")]
    assert f"{new.serial_number:x} of spiffe://test/site/site-a" in line


def test_a_replaced_certificate_is_renewed_when_it_is_due(
    lived: Callable[[float], Identity], signer: Signer, service: Serving
) -> None:
    follower = Follower(lived(0.0), address(service))
    follower.look()
    assert signer.requests == []
    lived(0.7)
    follower.look()
    assert len(signer.requests) == 1


@pytest.mark.parametrize("damage", ["empty", "other identity"])
def test_files_that_cannot_be_used_are_said_once(
    fleet: Fleet, site: Identity, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    follower = Follower(site, None)
    follower.look()
    if damage == "empty":
        site.certificate.write_bytes(b"")
    else:
        other = identity_directory(fleet.directory, Role.SITE, "site-b")
        store_identity(
            site.directory,
            load_key(other / "tls.key"),
            (other / "tls.crt").read_text(),
            (other / "ca.crt").read_text(),
        )
    for _ in range(3):
        follower.look()
    (line,) = said(caplog, logging.ERROR)
    assert line.startswith("the certificate in use stays: ")
    assert "is not a PEM certificate" in line or "now holds the identity" in line
    new = replace(site, fleet.authority)
    follower.look()
    assert certificate_of(site) == new
    assert len(said(caplog, logging.ERROR)) == 1


def test_nothing_ends_the_thread(
    site: Identity, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([RuntimeError("first"), None])
    follower = Follower(site, None)

    def look() -> None:
        problem = next(looks, None)
        if problem is not None:
            raise problem
        follower._over.set()

    monkeypatch.setattr("certs.renewal._LOOK_SECONDS", 0.0)
    monkeypatch.setattr(follower, "look", look)
    follower.start()
    follower.join(20)
    assert not follower.is_alive()
    assert "is not followed" in caplog.text
