"""The enrolment service's client: whom it talks to, how long it tries, and what it makes of a refusal."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.enrolment import CODES, Application, certificate_fingerprint
from certs.errors import (
    CertificateError,
    ConnectionRefusedByFleetError,
    FleetError,
    InvitationError,
)
from certs.guard import Receive, Scope, Send
from certs.identity import ensure_identity
from certs.roles import ENROLMENT_NAME, Role
from supernode import enrol as module
from supernode.enrol import RetiredKeyError, authority_of, enrol, refuse_unfit, report_dataset
from tests.joining import Fleet, answer_json

NAME = "lab-7"
KEYS = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
APPLICATION = Application.make("test", NAME, *KEYS)


@pytest.fixture
def fleet(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setattr(module, "_PAUSES", (0.01, 0.01))
    made = Fleet(tmp_path, f"localhost:{free_port()}", f"localhost:{free_port()}")
    with made.serve() as serving:
        yield serving


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without waiting."""
    waited: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        now[0] += seconds

    class Clock:
        time = staticmethod(time.time)
        monotonic = staticmethod(lambda: now[0])

    Clock.sleep = staticmethod(sleep)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "time", Clock)
    return waited


def answering(*answers: tuple[int, Any, Mapping[str, str]]) -> Any:
    """An application that gives these answers in turn, the last for ever; the authority's path answers truly."""
    left = list(answers)

    async def serve(_scope: Scope, _receive: Receive, send: Send) -> None:
        status, content, headers = left.pop(0) if len(left) > 1 else left[0]
        await answer_json(send, content, status, **headers)

    return serve


def instead_of_enrol(fleet: Fleet, *answers: tuple[int, Any, Mapping[str, str]]) -> None:
    paths = {**fleet.api.anonymous(), "/v1/enrol": answering(*answers)}
    fleet.service._anonymous = paths


def test_the_authority_of_a_bundle_is_found(fleet: Fleet) -> None:
    pem = authority_of(fleet.enrolment, fleet.fingerprint)
    assert pem.encode() == fleet.authority.bundle
    assert fleet.asked == [("GET", "/v1/authority")]


def test_the_right_one_of_two_is_taken(fleet: Fleet, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other", "test")
    bundle = other.bundle + fleet.authority.bundle
    record = {"authority": bundle.decode(), "federation": "test", "time": 0.0}
    fleet.service.instead = answering((200, record, {}))
    for authority in (fleet.authority, other):
        fingerprint = certificate_fingerprint(authority.certificate)
        assert authority_of(fleet.enrolment, fingerprint).encode() == authority.bundle


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "x",
        {"authority": 5},
        {"authority": "x"},
        {"detail": "\x1b[2J an impostor's words"},
        {"authority": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
    ],
)
def test_an_answer_that_is_none_is_not_repeated(fleet: Fleet, content: Any) -> None:
    fleet.service.instead = answering((200, content, {}))
    with pytest.raises(
        ConnectionRefusedByFleetError, match="does not answer as an enrolment"
    ) as error:
        authority_of(fleet.enrolment, fleet.fingerprint)
    assert "impostor" not in str(error.value)


def test_an_answer_has_a_bounded_size(fleet: Fleet) -> None:
    async def large(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(64):
            await send({"type": "http.response.body", "body": b" " * 16384, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    fleet.service.instead = large
    with pytest.raises(ConnectionRefusedByFleetError, match="too large"):
        authority_of(fleet.enrolment, fleet.fingerprint)


def test_an_answer_has_a_bounded_time(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that trickles never meets a timeout of its own."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.5)

    async def trickle(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)
        await send({"type": "http.response.body", "body": b""})

    fleet.service.instead = trickle
    with pytest.raises(ConnectionRefusedByFleetError, match="took too long"):
        authority_of(fleet.enrolment, fleet.fingerprint)


def test_another_authority_gets_nothing(fleet: Fleet) -> None:
    invitation = fleet.invite(NAME, fingerprint="ab" * 32)
    with pytest.raises(
        InvitationError, match=r"fingerprint abababababababab\.\.\..*nothing was sent"
    ):
        enrol(invitation, APPLICATION)
    assert fleet.asked == [("GET", "/v1/authority")]


def test_an_invitation_to_another_federation_gets_nothing(fleet: Fleet) -> None:
    application = replace(APPLICATION, federation="other")
    with pytest.raises(InvitationError, match=r"'other'.*is that of 'test'"):
        enrol(fleet.invite(NAME, federation="other"), application)
    assert fleet.asked == [("GET", "/v1/authority")]


@pytest.mark.parametrize("role", [Role.SUPERLINK, Role.SITE])
def test_another_holder_of_the_federation_gets_nothing(
    fleet: Fleet, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member could answer at the address as well: it is not the enrolment service."""
    name = "superlink" if role is Role.SUPERLINK else "lab-8"
    directory = fleet.directory / "impostor"
    ensure_identity(fleet.authority, directory, role, name, ["localhost"])
    genuine = fleet.pki / Role.ENROLMENT / ENROLMENT_NAME
    for file in ("ca.crt", "tls.key", "tls.crt"):
        (genuine / file).write_bytes((directory / file).read_bytes())
    with pytest.raises(
        ConnectionRefusedByFleetError, match=f"the server is spiffe://test/{role}/{name}"
    ):
        enrol(fleet.invite(NAME), APPLICATION)
    assert {path for _, path in fleet.asked} == {"/v1/authority"}


def test_nothing_is_sent_to_a_server_of_another_name(fleet: Fleet) -> None:
    address = fleet.enrolment.replace("localhost", "127.0.0.2")
    with pytest.raises(ConnectionRefusedByFleetError, match="cannot be reached"):
        enrol(fleet.invite(NAME, address=address), APPLICATION)
    assert fleet.asked == []


def test_an_application_gets_a_membership_and_the_same_again(fleet: Fleet) -> None:
    invitation = fleet.invite(NAME)
    first, second = enrol(invitation, APPLICATION), enrol(invitation, APPLICATION)
    assert first.superlink == second.superlink == fleet.superlink
    assert first.authority.encode() == fleet.authority.bundle
    assert fleet.states(NAME) == ["used"]
    assert len(fleet.register.known) == 1


def test_a_busy_service_is_asked_when_it_says(fleet: Fleet, pauses: list[float]) -> None:
    busy = {"code": "busy", "detail": "too many"}
    content = {"code": "unknown", "detail": "never heard of it"}
    instead_of_enrol(
        fleet,
        (429, busy, {"retry_after": "7"}),
        (503, busy, {"retry_after": "0"}),
        (503, busy, {}),
        (429, busy, {"retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (400, content, {}),
    )
    with pytest.raises(InvitationError, match="never heard of it"):
        enrol(fleet.invite(NAME), APPLICATION)
    assert pauses == [7.0, 0.1, 2.0, 2.0]


@pytest.mark.parametrize("seconds", ["1", "13", "59", "60", "100000", "inf", "nan", "-5"])
def test_patience_ends_after_two_minutes(fleet: Fleet, pauses: list[float], seconds: str) -> None:
    busy = {"code": "busy", "detail": "too many requests"}
    instead_of_enrol(fleet, (429, busy, {"retry_after": seconds}))
    with pytest.raises(ConnectionRefusedByFleetError, match="cannot enrol now: too many requests"):
        enrol(fleet.invite(NAME), APPLICATION)
    assert sum(pauses) <= 120


def test_a_service_that_is_away_is_tried_again(
    tmp_path: Path, free_port: Callable[[], int], pauses: list[float]
) -> None:
    address = f"localhost:{free_port()}"
    with pytest.raises(
        ConnectionRefusedByFleetError, match=f"service at {address} cannot be reached"
    ):
        authority_of(address, "00" * 32)
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "address",
    [
        "localhost:99999",
        "no.such.host.invalid:1",
        "a..b:1",
        "-:1",
        "[::ffff:::]:1",
        "x" * 70 + ":1",
    ],
)
def test_an_address_that_is_none_is_one_sentence(address: str, pauses: list[float]) -> None:
    with pytest.raises(ConnectionRefusedByFleetError) as error:
        authority_of(address, "00" * 32)
    assert address in str(error.value)
    assert "\n" not in str(error.value)


EXPECTED: dict[str, type[FleetError]] = {
    **dict.fromkeys(
        ("unknown", "expired", "used", "cancelled", "federation", "site", "member"), InvitationError
    ),
    **dict.fromkeys(("malformed", "too-large", "proof", "role", "revoked"), CertificateError),
    "retired-key": RetiredKeyError,
    **dict.fromkeys(("busy", "unavailable"), ConnectionRefusedByFleetError),
}


def test_every_code_has_its_error() -> None:
    assert set(EXPECTED) == CODES


@pytest.mark.parametrize("code", sorted(EXPECTED))
def test_a_refusal_is_the_services_own_sentence(
    fleet: Fleet, code: str, pauses: list[float]
) -> None:
    record = {"code": code, "detail": "because of\n\x1b[31m this." + "x" * 1000}
    instead_of_enrol(fleet, (409, record, {}))
    with pytest.raises(FleetError, match="because of") as error:
        enrol(fleet.invite(NAME), APPLICATION)
    assert type(error.value) is EXPECTED[code]
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 450


@pytest.mark.parametrize(
    "content", [None, [], {"code": "other"}, {"code": ["used"]}, {"detail": 5}]
)
def test_an_answer_without_a_code_is_one_sentence(fleet: Fleet, content: Any) -> None:
    instead_of_enrol(fleet, (400, content, {}))
    with pytest.raises(ConnectionRefusedByFleetError, match="answered 400"):
        enrol(fleet.invite(NAME), APPLICATION)


def test_a_membership_that_is_none_is_refused(fleet: Fleet) -> None:
    instead_of_enrol(fleet, (200, {"certificate": "x"}, {}))
    with pytest.raises(CertificateError, match="a membership has the fields"):
        enrol(fleet.invite(NAME), APPLICATION)


def test_an_invitation_is_looked_at_before_anybody_is_asked(fleet: Fleet) -> None:
    invitation = fleet.invite(NAME)
    refuse_unfit(invitation, "test", NAME)
    for federation, site in (("other", NAME), ("test", "lab-8")):
        with pytest.raises(InvitationError, match="the invitation is for the site 'lab-7'"):
            refuse_unfit(invitation, federation, site)
    with pytest.raises(InvitationError, match="not for 'lab-8'"):
        enrol(invitation, Application.make("test", "lab-8", *KEYS))
    assert fleet.asked == []


def test_a_clock_may_be_wrong_by_minutes(fleet: Fleet) -> None:
    """What ended a moment ago by this clock, the service decides on; what ended long ago needs no asking."""
    now = int(time.time())
    refuse_unfit(fleet.invite(NAME, expires=now - 240), "test", NAME)
    with pytest.raises(InvitationError, match="by this machine's clock"):
        refuse_unfit(fleet.invite(NAME, expires=now - 360), "test", NAME)
    assert enrol(fleet.invite(NAME, expires=now - 240), APPLICATION).site == NAME


def test_only_a_member_reports_its_dataset(fleet: Fleet) -> None:
    numbers = {"episodes": 4, "frames": 400, "bytes": 1, "fps": 30}
    with pytest.raises(ConnectionRefusedByFleetError, match="answered 404"):
        report_dataset(fleet.identity(Role.SUPERLINK), fleet.enrolment, numbers)


def test_the_secret_is_in_no_error(fleet: Fleet, pauses: list[float]) -> None:
    invitation = fleet.invite(NAME)
    for code in sorted(CODES):
        # A service that repeats what it was sent.
        instead_of_enrol(fleet, (400, {"code": code, "detail": "no"}, {}))
        with pytest.raises(FleetError) as error:
            enrol(invitation, APPLICATION)
        chain: BaseException | None = error.value
        while chain is not None:
            assert invitation.secret.hex() not in repr(chain)
            assert invitation.encode()[-30:] not in repr(chain)
            chain = chain.__cause__ or chain.__context__
