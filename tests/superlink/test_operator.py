"""The operator's commands against a running SuperLink and enrolment service, and what they make of refusals."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from certs.authority import Authority
from certs.contexts import client_context, enrolment_server
from certs.enrolment import Application, Membership, certificate_fingerprint
from certs.errors import (
    ConfigError,
    ConnectionRefusedByFleetError,
    FleetError,
    InvitationError,
    UnknownSiteError,
)
from certs.files import load_certificate
from certs.identity import Identity, authority_directory, ensure_identity, store_identity
from certs.invitation import Invitation
from certs.roles import ENROLMENT_NAME, Role
from superlink.cli import duration
from superlink.demo import wait_for_superlink
from superlink.operator import Enrolment, table
from supernode.enrol import enrol
from tests.conftest import Vlafleet
from tests.enrolling import Keys
from tests.federation import Running, running_superlink


@dataclass(frozen=True)
class Fleet:
    """A running federation, and its operator."""

    running: Running
    port: int
    vlafleet: Vlafleet

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def directory(self) -> Path:
        return self.running.processes.logs

    def site(self, *arguments: object, identity: Path | None = None, code: int = 0) -> Any:
        """Run a 'vlafleet site' command as the operator."""
        own = identity or self.running.identity(Role.OPERATOR, "admin")
        done = self.vlafleet(
            "site", *arguments, "--identity", own, "--enrolment", self.address, cwd=self.directory
        )
        assert done.returncode == code, done
        return done

    def listed(self, name: str) -> dict[str, Any]:
        """What 'site list' says of a site."""
        sites = json.loads(self.site("list", "--json").stdout)["sites"]
        (site,) = [site for site in sites if site["site"] == name]
        return dict(site)

    def audit(self) -> list[dict[str, Any]]:
        lines = (self.directory / "enrolment" / "audit.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], vlafleet: Vlafleet
) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("operator")
    with running_superlink(directory, free_port()) as running:
        port = free_port()
        own = running.identity(Role.ENROLMENT, ENROLMENT_NAME)
        running.processes.start(
            "enrolment",
            *("enrolment", "--identity", str(own), "--host", "localhost", "--port", str(port)),
            *("--authority", str(authority_directory(running.pki))),
            *("--state", str(directory / "enrolment"), "--superlink", running.address),
            *("--site-lifetime", "90m"),
        )
        wait_for_superlink(running.processes, own, f"localhost:{port}")
        yield Fleet(running, port, vlafleet)


def application(site: str, keys: Keys) -> Application:
    return Application.from_json(keys.application(site))


@pytest.mark.federation
def test_a_sites_whole_life(fleet: Fleet, tmp_path: Path) -> None:
    invited = fleet.site("invite", "lab-1", "--valid", "15m")
    (line,) = invited.stdout.splitlines()
    invitation = Invitation.decode(line)
    assert (invitation.federation, invitation.site) == ("test", "lab-1")
    assert invitation.address == fleet.address
    assert 840 < invitation.expires - time.time() <= 900
    assert f"{invitation.expires_at:%Y-%m-%d %H:%M} UTC" in invited.stderr
    assert "vlafleet site join INVITATION --dataset URI" in invited.stderr
    assert fleet.listed("lab-1")["state"] == "invited"
    assert fleet.listed("lab-1")["invited_until"] == invitation.expires

    keys = Keys()
    membership = enrol(invitation, application("lab-1", keys))
    site = fleet.listed("lab-1")
    assert site["state"] == "registered"
    assert site["last_heartbeat"] is None
    assert site["invited_until"] is None
    certificate = x509.load_pem_x509_certificate(membership.certificate.encode())
    assert site["not_after"] == int(certificate.not_valid_after_utc.timestamp())
    assert 5000 < site["not_after"] - time.time() < 5500  # 90 min

    store_identity(tmp_path, keys.tls, membership.certificate, membership.authority)
    own = Identity.load(tmp_path, Role.SITE)
    context = client_context(own, enrolment_server("test"))
    dataset = {"episodes": 50, "frames": 11_939, "bytes": 82_000_000, "fps": 30}
    with httpx.Client(verify=context) as client:
        answer = client.put(f"https://{fleet.address}/v1/dataset", json=dataset)
    assert answer.status_code == 204, answer.text
    (row,) = [r for r in fleet.site("list").stdout.splitlines() if r.startswith("lab-1 ")]
    assert re.split(r" {2,}", row)[1:] == [
        "registered",
        "-",
        f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M}",
        "-",
        "50 episodes, 11939 frames, 82.0 MB",
    ]

    evicted = fleet.site("revoke", "lab-1").stdout
    assert evicted == (
        "revoked site lab-1: 2 certificate(s), its SuperNode unregistered, "
        "0 open invitation(s) cancelled\n"
    )
    assert fleet.listed("lab-1")["state"] == "revoked"
    with httpx.Client(verify=client_context(own)) as client, pytest.raises(httpx.TransportError):
        client.get(f"https://{fleet.running.address}/v1/sites")

    again = Invitation.decode(fleet.site("invite", "lab-1").stdout)
    enrol(again, application("lab-1", Keys()))
    assert fleet.listed("lab-1")["state"] == "registered"
    warned = fleet.site("invite", "lab-1")
    assert "lab-1 is a member already" in warned.stderr
    assert "1 invitation(s)" in fleet.site("cancel", "lab-1").stdout

    events = [line["event"] for line in fleet.audit() if line.get("site") == "lab-1"]
    assert events == [
        *("invited", "enrolled", "revoked", "invited", "enrolled", "invited"),
        "invitation-cancelled",
    ]
    secrets = [
        *(one.encode().removeprefix("vlafleet1.") for one in (invitation, again)),
        *(one.secret.hex() for one in (invitation, again)),
        "PRIVATE KEY",
    ]
    for path in fleet.directory.rglob("*"):
        if path.is_file() and fleet.running.pki not in path.parents:
            for secret in secrets:
                assert secret.encode() not in path.read_bytes(), f"{path} holds a secret"
    for secret in secrets:
        assert secret not in invited.stderr


@pytest.mark.federation
def test_a_cancelled_invitation(fleet: Fleet) -> None:
    invitation = Invitation.decode(fleet.site("invite", "lab-2").stdout)
    assert fleet.site("cancel", "lab-2").stdout == "cancelled 1 invitation(s) of site lab-2\n"
    done = fleet.site("cancel", "lab-2", code=20)
    assert done.stderr.startswith("vlafleet: no invitation of site 'lab-2' is open; see")
    with pytest.raises(InvitationError):
        enrol(invitation, application("lab-2", Keys()))


@pytest.mark.federation
def test_approval_of_a_file(fleet: Fleet, tmp_path: Path) -> None:
    keys = Keys()
    request, out = tmp_path / "request.json", tmp_path / "membership.json"
    request.write_text(json.dumps(keys.application("lab-3")))
    said = fleet.site("approve", request, "--out", out).stdout
    membership = Membership.from_json(json.loads(out.read_text()))
    assert membership.site == "lab-3"
    assert membership.enrolment == fleet.address
    assert membership.superlink == fleet.running.address
    authority = Authority.load(authority_directory(fleet.running.pki))
    assert f"authority   {certificate_fingerprint(authority.certificate)}: say this" in said
    (line,) = [line for line in fleet.audit() if line["event"] == "approved"]
    assert f"keys        {line['keys']}\n" in said
    assert fleet.listed("lab-3")["state"] == "registered"
    # Without --out it lies where the command was run.
    assert "lab-3-membership.json" in fleet.site("approve", request).stdout
    assert (fleet.directory / "lab-3-membership.json").exists()
    request.write_text(json.dumps(Keys().application("lab-3")))
    done = fleet.site("approve", request, code=20)
    assert "lab-3" in done.stderr


@pytest.mark.federation
def test_an_unknown_site(fleet: Fleet) -> None:
    done = fleet.site("revoke", "nobody", code=11)
    assert re.fullmatch(r"vlafleet: .*'nobody'.*\n", done.stderr)


@pytest.mark.federation
def test_who_is_no_operator_any_more(fleet: Fleet, tmp_path: Path) -> None:
    authority = Authority.load(authority_directory(fleet.running.pki))
    ensure_identity(authority, tmp_path, Role.OPERATOR, "former")
    assert fleet.site("list", identity=tmp_path).returncode == 0
    authority.revoke(Role.OPERATOR, "former")
    deadline = time.monotonic() + 10
    while fleet.vlafleet(
        *("site", "list", "--identity", tmp_path, "--enrolment", fleet.address)
    ).returncode == 0:  # fmt: skip
        assert time.monotonic() < deadline
    done = fleet.site("list", identity=tmp_path, code=15)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.federation
def test_the_operators_certificate_renews_on_the_way(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.load(authority_directory(fleet.running.pki))
    ensure_identity(authority, tmp_path, Role.OPERATOR, "anna")
    first = load_certificate(tmp_path / "tls.crt")

    def due(_certificate: x509.Certificate) -> datetime:
        return datetime(2000, 1, 1, tzinfo=UTC)

    with Enrolment.connect(tmp_path, fleet.address) as service:
        service.sites()
    assert load_certificate(tmp_path / "tls.crt") == first
    monkeypatch.setattr("superlink.operator.renew_at", due)
    with Enrolment.connect(tmp_path, fleet.address) as service:
        service.sites()
    second = load_certificate(tmp_path / "tls.crt")
    assert second.serial_number != first.serial_number
    assert second.public_key() != first.public_key()


@pytest.mark.federation
def test_a_renewal_that_fails_stops_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_identity: Identity, _address: str) -> Identity:
        raise ConnectionRefusedByFleetError("it does not renew")

    monkeypatch.setattr("superlink.operator.renew_at", lambda _: datetime(2000, 1, 1, tzinfo=UTC))
    monkeypatch.setattr("superlink.operator.renew", refuse)
    with Enrolment.connect(
        fleet.running.identity(Role.OPERATOR, "admin"), fleet.address
    ) as service:
        service.sites()
    assert "was not renewed: it does not renew" in caplog.text


def answering(status: int, body: Any) -> Enrolment:
    """A connection to a service that gives this answer."""
    text = body if isinstance(body, str) else json.dumps(body)
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, text=text))
    return Enrolment(httpx.Client(transport=transport), "host:9093")


REFUSED = ConnectionRefusedByFleetError
ANSWERS: list[tuple[int, Any, type[FleetError], type[FleetError], str]] = [
    (400, {"code": "unknown", "detail": "no x"}, InvitationError, UnknownSiteError, "no x"),
    (409, {"code": "member", "detail": "a y"}, InvitationError, UnknownSiteError, "a y"),
    (429, {"code": "busy", "detail": "later"}, REFUSED, REFUSED, "later"),
    (403, {"code": "role", "detail": "who?"}, REFUSED, REFUSED, "who?"),
    (503, {"code": "unavailable", "detail": "down"}, REFUSED, REFUSED, "down"),
    # The guard, something that is no enrolment service, and a crash.
    (404, {"code": 40400, "detail": "guard"}, REFUSED, REFUSED, "guard"),
    (502, "<html>", REFUSED, REFUSED, r"\(502\): no reason given"),
    (500, [], REFUSED, REFUSED, r"\(500\): no reason given"),
]


@pytest.mark.parametrize(("status", "body", "invitation", "revocation", "words"), ANSWERS)
def test_a_refusal_is_a_sentence_with_its_exit_code(
    status: int,
    body: Any,
    invitation: type[FleetError],
    revocation: type[FleetError],
    words: str,
) -> None:
    service = answering(status, body)
    with pytest.raises(invitation, match=words):
        service.invite("lab-1", duration("1h"))
    with pytest.raises(invitation, match=words):
        service.cancel("lab-1")
    with pytest.raises(revocation, match=words):
        service.revoke("lab-1")
    with pytest.raises(ConnectionRefusedByFleetError, match=words):
        service.sites()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("1h", 3600), ("2d", 172_800)]
)
def test_durations(text: str, seconds: int) -> None:
    assert duration(text).total_seconds() == seconds


@pytest.mark.parametrize(
    "text", ["", "1", "h", "0h", "-1h", "1.5h", "1 h", "1w", "1h30m", "00001s", "99999999d", "1h\n"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration: write a number and s, m, h or d"):
        duration(text)


def test_the_table() -> None:
    now = 1_800_000_000.0
    none = {"last_heartbeat": None, "not_after": None, "invited_until": None, "episodes": None}
    sites: list[dict[str, Any]] = [
        {"site": "lab-1", "state": "online", **none, "last_heartbeat": now - 12.2},
        {"site": "a-long-site-name", "state": "offline", **none, "last_heartbeat": now - 7300},
        {"site": "lab-3", "state": "invited", **none, "invited_until": 1_800_003_600},
        # Its clock, or ours.
        {"site": "lab-4", "state": "online", **none, "last_heartbeat": now + 3},
        {"site": "lab-5", "state": "expired", **none, "last_heartbeat": now - 3e5},
    ]
    assert table(sites, now).splitlines() == [
        "SITE              STATE    HEARTBEAT  CERTIFICATE UNTIL  INVITED UNTIL     DATASET",
        "lab-1             online   12 s ago   -                  -                 -",
        "a-long-site-name  offline  2 h ago    -                  -                 -",
        "lab-3             invited  -          -                  2027-01-15 09:00  -",
        "lab-4             online   0 s ago    -                  -                 -",
        "lab-5             expired  3 d ago    -                  -                 -",
    ]
    assert table([], now).startswith("SITE")
