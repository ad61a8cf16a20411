"""What members ask of the enrolment service, and an operator about them: renewal, eviction, the list of sites."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from certs.enrolment import signing_request
from certs.files import load_certificate
from certs.identity import Identity, ensure_identity, hosts_of
from certs.lifetime import LIFETIMES, issued_at, life
from certs.roles import Peer, Role
from superlink.refused import Refused
from superlink.upkeep import Upkeep, renew_own
from tests.enrolling import FEDERATION, Keys, Service, new_key


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def csr(role: Role = Role.SITE, name: str = "site-c", key: Any = None) -> str:
    return signing_request(key or new_key(), FEDERATION, role, name)


def names(certificate: x509.Certificate) -> set[str]:
    return set(hosts_of(certificate))


@pytest.mark.parametrize(
    ("role", "name", "hosts"),
    [
        (Role.SITE, "site-c", ["localhost", "127.0.0.1", "::1", "site-c"]),
        (Role.SUPERLINK, "superlink", ["fleet.example", "10.0.0.5"]),
        (Role.ENROLMENT, "enrolment", ["fleet.example"]),
        (Role.SUPEREXEC, "superlink", []),
        (Role.OPERATOR, "admin", []),
        (Role.MONITOR, "prometheus", []),
    ],
)
def test_every_holder_renews(service: Service, role: Role, name: str, hosts: list[str]) -> None:
    key = new_key()
    presented = service.issued(role, name, hosts=hosts, lifetime=timedelta(minutes=1))
    # Who signs it decides what the certificate says, whatever the request says.
    request = {"csr": csr(Role.OPERATOR, "somebody", key)}
    reply = service.ask("POST", "/v1/renew", request, presented)
    assert reply.status == 200, reply.body
    certificate = x509.load_pem_x509_certificate(reply.body["certificate"].encode())
    peer = Peer.of(certificate)
    assert (peer.federation, peer.role, peer.name) == (FEDERATION, role, name)
    assert certificate.public_key() == key.public_key()
    assert names(certificate) == set(hosts)
    assert life(certificate) == LIFETIMES[role]
    assert datetime.now(UTC) - issued_at(certificate) < timedelta(minutes=5)
    assert reply.body["authority"].encode() == service.authority.bundle
    [line] = service.events()
    assert (line["event"], line["role"], line["name"]) == ("renewed", role, name)
    assert line["serial"] == f"{presented.serial_number:x}"
    assert line["issued"] == f"{certificate.serial_number:x}"


def test_a_site_renews_for_its_superexec_only(service: Service) -> None:
    site = service.issued(Role.SITE, "site-c", hosts=["localhost"])
    reply = service.ask("POST", "/v1/renew", {"csr": csr(), "role": "superexec"}, site)
    certificate = x509.load_pem_x509_certificate(reply.body["certificate"].encode())
    assert Peer.of(certificate).uri == f"spiffe://{FEDERATION}/superexec/site-c"
    assert names(certificate) == set()
    for role in ("operator", "superlink", "enrolment", "monitor", "nobody", ""):
        before = service.written()
        reply = service.ask("POST", "/v1/renew", {"csr": csr(), "role": role}, site)
        assert (reply.status, reply.body["code"]) == (403, "role")
        assert service.written() == before
    superexec = service.issued(Role.SUPEREXEC, "site-c")
    reply = service.ask("POST", "/v1/renew", {"csr": csr(), "role": "site"}, superexec)
    assert (reply.status, reply.body["code"]) == (403, "role")


@pytest.mark.parametrize(
    ("code", "body"),
    [
        ("malformed", []),
        ("malformed", {}),
        ("malformed", {"csr": 1}),
        ("malformed", {"csr": "x", "name": "admin"}),
        ("malformed", {"csr": "x", "role": ["site"]}),
        ("proof", {"csr": "x"}),
        ("proof", {"csr": signing_request.__doc__}),
    ],
)
def test_renewals_are_asked_for_strictly(service: Service, code: str, body: Any) -> None:
    site = service.issued(Role.SITE, "site-c")
    before = service.written()
    reply = service.ask("POST", "/v1/renew", body, site)
    assert (reply.status, reply.body["code"]) == (400, code)
    assert service.written() == before
    [line] = service.events()
    assert (line["event"], line["reason"], line["name"]) == ("renewal-refused", code, "site-c")


def test_a_renewal_is_for_a_new_key(service: Service) -> None:
    key = new_key()
    site = service.authority.issue(key.public_key(), Role.SITE, "site-c")
    reply = service.ask("POST", "/v1/renew", {"csr": csr(key=key)}, site)
    assert (reply.status, reply.body["code"]) == (400, "proof")


def test_nobody_renews_what_is_revoked(service: Service) -> None:
    site = service.issued(Role.SITE, "site-c")
    service.operator("POST", "/v1/revoke", site="site-c")
    before = service.written()
    reply = service.ask("POST", "/v1/renew", {"csr": csr()}, site)
    assert (reply.status, reply.body["code"]) == (403, "revoked")
    assert service.written() == before


def test_revoked_while_the_next_certificate_is_signed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'vlafleet certs revoke' works on the same directory: what is signed after it must not outlive it."""
    site = service.issued(Role.SITE, "site-c")
    issue = service.authority.issue

    def revoked_before(_self: object, *arguments: Any, **options: Any) -> x509.Certificate:
        service.authority.revoke(Role.SITE, "site-c")
        return issue(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("certs.authority.Authority.issue", revoked_before)
        reply = service.ask("POST", "/v1/renew", {"csr": csr()}, site)
    assert (reply.status, reply.body["code"]) == (403, "revoked")
    states = [line.state(datetime.now(UTC)) for line in service.authority.issued()]
    assert states == ["revoked", "revoked"]


def test_evicting_a_site(service: Service) -> None:
    for site in ("site-c", "site-d"):
        service.enrol(service.invite(site), site, Keys())
    service.invite("site-c")
    reply = service.operator("POST", "/v1/revoke", site="site-c")
    assert reply.status == 200
    assert reply.body == {"certificates": 2, "unregistered": True, "invitations": 1}
    assert service.register.alive() == ["site-d"]
    assert service.woken == service.publisher.published == 1
    now = datetime.now(UTC)
    states = {
        (line.role, line.name): line.state(now)
        for line in service.authority.issued()
        if line.role is not Role.OPERATOR
    }
    assert states == {
        (Role.SITE, "site-c"): "revoked",
        (Role.SUPEREXEC, "site-c"): "revoked",
        (Role.SITE, "site-d"): "valid",
        (Role.SUPEREXEC, "site-d"): "valid",
    }
    crl = x509.load_pem_x509_crl(service.authority.crl.read_bytes())
    assert len(list(crl)) == 2
    line = service.events()[-1]
    assert (line["event"], line["site"], line["role"]) == ("revoked", "site-c", "operator")
    assert json.loads((service.directory / "state" / "evictions.json").read_bytes()) == []
    again = service.operator("POST", "/v1/revoke", site="site-c").body
    assert again == {"certificates": 0, "unregistered": False, "invitations": 0}


def test_a_used_invitation_does_not_bring_back_the_evicted(service: Service) -> None:
    keys = Keys()
    secret = service.invite("site-c")
    service.enrol(secret, "site-c", keys)
    service.operator("POST", "/v1/revoke", site="site-c")
    reply = service.enrol(secret, "site-c", keys)
    assert (reply.status, reply.body["code"]) == (410, "cancelled")


@pytest.mark.parametrize("body", [{"site": "site-x"}, {"site": "enrolment"}])
def test_evicting_somebody_else(service: Service, body: dict[str, str]) -> None:
    service.issued(Role.ENROLMENT, "enrolment")
    reply = service.operator("POST", "/v1/revoke", **body)
    assert (reply.status, reply.body["code"]) == (400, "unknown")
    assert service.events() == []


@pytest.mark.parametrize("body", [{"site": "superlink"}, {"site": 7}, {"name": "x"}, {}])
def test_evictions_are_asked_for_strictly(service: Service, body: dict[str, Any]) -> None:
    reply = service.operator("POST", "/v1/revoke", **body)
    assert (reply.status, reply.body["code"]) == (400, "malformed")


def test_an_eviction_without_a_superlink_is_finished_later(service: Service) -> None:
    keys = Keys()
    service.enrol(service.invite("site-c"), "site-c", keys)
    service.register.reachable = False
    reply = service.operator("POST", "/v1/revoke", site="site-c")
    assert (reply.status, reply.body["code"]) == (503, "unavailable")
    assert reply.body["detail"].startswith("2 certificates and 0 invitations of site-c are revoked")
    assert "may still be registered" in reply.body["detail"]
    assert "revocation list" in reply.body["detail"]
    now = datetime.now(UTC)
    site_lines = [line for line in service.authority.issued() if line.role is Role.SITE]
    assert [line.state(now) for line in site_lines] == ["revoked"]
    line = service.events()[-1]
    assert (line["event"], line["certificates"]) == ("revoked", 2)
    assert "may still be registered" in line["open"]
    assert service.register.alive() == ["site-c"]
    # The process ends before it is done; the next one goes on.
    service.start()
    service.register.reachable = True
    service.api.finish_evictions()
    assert service.register.alive() == []
    line = service.events()[-1]
    assert (line["event"], line["site"], line["role"]) == ("revoked", "site-c", None)
    lines = len(service.events())
    service.api.finish_evictions()
    assert len(service.events()) == lines


def test_who_comes_back_before_the_eviction_is_finished_stays(service: Service) -> None:
    service.enrol(service.invite("site-c"), "site-c", Keys())
    service.register.reachable = False
    service.operator("POST", "/v1/revoke", site="site-c")
    secret = service.invite("site-c")
    service.register.reachable = True
    keys = Keys()
    assert service.enrol(secret, "site-c", keys).status == 200
    service.api.finish_evictions()
    assert [node.status for node in service.register.known] == ["unregistered", "registered"]
    now = datetime.now(UTC)
    site_lines = [line for line in service.authority.issued() if line.role is Role.SITE]
    assert [line.state(now) for line in site_lines] == ["revoked", "valid"]


def test_the_list_of_sites(service: Service) -> None:
    names = ("registered", "online", "offline", "evicted", "late")
    for name in names:
        assert service.enrol(service.invite(name), name, Keys()).status == 200
    service.register.known = [
        replace(node, status=node.name, last_heartbeat=1234.5)
        if node.name in {"online", "offline"}
        else node
        for node in service.register.known
    ]
    service.operator("POST", "/v1/revoke", site="evicted")
    service.authority.issue(
        new_key().public_key(), Role.SITE, "late", lifetime=timedelta(seconds=-1)
    )
    service.invite("invited")
    service.invite("uninvited")
    service.operator("DELETE", "/v1/invitations/uninvited")
    online = next(
        line
        for line in service.authority.issued()
        if (line.role, line.name) == (Role.SITE, "online")
    )
    certificate = service.issued(Role.SITE, "online")
    report = {"episodes": 50, "frames": 15000, "bytes": 10**9, "fps": 30}
    assert service.ask("PUT", "/v1/dataset", report, certificate).status == 204
    sites = {site["site"]: site for site in service.operator("GET", "/v1/sites").body["sites"]}
    assert {name: site["state"] for name, site in sites.items()} == {
        "registered": "registered",
        "online": "online",
        "offline": "offline",
        "evicted": "revoked",
        "late": "expired",
        "invited": "invited",
    }
    assert list(sites) == sorted(sites)
    assert sites["online"] == {
        "site": "online",
        "state": "online",
        "last_heartbeat": 1234.5,
        "not_after": pytest.approx(online.not_after.timestamp(), abs=60),
        "episodes": 50,
        "frames": 15000,
        "bytes": 10**9,
    }
    assert sites["invited"] == dict.fromkeys(sites["online"]) | {
        "site": "invited",
        "state": "invited",
    }
    service.invite("evicted")
    sites = {site["site"]: site for site in service.operator("GET", "/v1/sites").body["sites"]}
    assert sites["evicted"]["state"] == "invited"
    service.register.reachable = False
    reply = service.operator("GET", "/v1/sites")
    assert (reply.status, reply.body["code"]) == (503, "unavailable")


@pytest.mark.parametrize(
    "change",
    [
        {"episodes": -1},
        {"episodes": 1.0},
        {"frames": True},
        {"frames": "1"},
        {"bytes": 2**53},
        {"bytes": None},
        {"more": 1},
    ],
)
def test_dataset_reports_are_read_strictly(service: Service, change: dict[str, Any]) -> None:
    report = {"episodes": 1, "frames": 1, "bytes": 1, "fps": 30, **change}
    reply = service.ask("PUT", "/v1/dataset", report, service.issued(Role.SITE, "site-c"))
    assert (reply.status, reply.body["code"]) == (400, "malformed")
    assert not (service.directory / "state" / "datasets.json").exists()


@pytest.fixture
def own(service: Service) -> Identity:
    """The service's own identity."""
    directory = service.directory / "identity"
    ensure_identity(service.authority, directory, Role.ENROLMENT, "enrolment", ["fleet.example"])
    return Identity.load(directory, Role.ENROLMENT)


def test_the_service_replaces_a_certificate_that_is_revoked(
    service: Service, own: Identity
) -> None:
    """As it does one of an authority that is being replaced: is_current says which."""
    before = own.certificate.read_bytes()
    renew_own(service.authority.directory, own)
    assert own.certificate.read_bytes() == before
    service.authority.revoke(Role.ENROLMENT, "enrolment")
    renew_own(service.authority.directory, own)
    renewed = Identity.load(own.directory, Role.ENROLMENT)
    assert renewed.peer.serial != own.peer.serial
    assert names(load_certificate(renewed.certificate)) == {"fleet.example"}


def test_the_service_renews_itself_at_two_thirds(
    service: Service, own: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, renewed in ((19, False), (21, True)):
        monkeypatch.setattr("superlink.upkeep.datetime", _later(timedelta(days=days)))
        renew_own(service.authority.directory, own)
        current = Identity.load(own.directory, Role.ENROLMENT)
        assert (current.peer.serial != own.peer.serial) is renewed


def _later(by: timedelta) -> type[datetime]:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + by

    return Later


def test_upkeep_goes_on_after_failures(caplog: pytest.LogCaptureFixture) -> None:
    upkeep = Upkeep()
    outcomes: list[Callable[[], None]] = []

    def duty() -> None:
        outcomes.pop(0)()

    def fail() -> None:
        raise Refused("unavailable", "the SuperLink does not answer")

    def crash() -> None:
        raise RuntimeError("never seen")

    def work() -> None:
        return None

    outcomes += [fail, fail, crash, work, fail]
    with caplog.at_level("INFO", logger="vlafleet.enrolment"):
        for _ in range(5):
            upkeep._do("a duty", duty)
    said = [record.getMessage() for record in caplog.records]
    failed = "a duty: the SuperLink does not answer; tried again every 3 s"
    assert said == [failed, "a duty", "a duty: done", failed]
