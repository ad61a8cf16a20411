"""Renewal while a site works: no request is lost, and the SuperExec gets its certificate through its SuperNode."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from certs.contexts import client_context
from certs.enrolment import MAX_BODY_BYTES, RENEW_PATH, signing_request
from certs.errors import ConnectionRefusedByFleetError
from certs.files import load_certificate, load_key
from certs.identity import Identity
from certs.lifetime import CLOCK_SKEW, renew_at
from certs.renewal import follow, renew
from certs.roles import ENROLMENT_NAME, SUPERLINK_NAME, Role
from supernode.metrics import SiteMetrics
from supernode.node import rules
from tests.renewing import Answer, Fleet, Signer, answer
from tests.serving import Serving, anybody, backdate, echo, serving, wait_until
from tests.serving import renew as replace

# A third of it is the time a renewal has: seconds, on a machine that does other work.
SHORT = timedelta(seconds=15)
RENEWALS = 3


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.make(tmp_path / "pki")


@pytest.fixture
def signer(fleet: Fleet) -> Signer:
    return Signer(fleet.authority, timedelta(hours=1))


@pytest.fixture
def service(fleet: Fleet, signer: Signer) -> Iterator[Serving]:
    own = fleet.identity(Role.ENROLMENT, ENROLMENT_NAME)
    with serving(own, rules={RENEW_PATH: (anybody, signer)}) as running:
        yield running


def address(running: Serving) -> str:
    return f"localhost:{running.port}"


def test_a_site_renews_while_it_polls(fleet: Fleet, signer: Signer, service: Serving) -> None:
    """Its client keeps connections open, as Flower's do, through the end of three certificates."""
    signer.lifetime = SHORT
    site = fleet.identity(Role.SITE, "site-a")
    first = replace(site, fleet.authority, lifetime=SHORT)
    site = Identity.load(site.directory, Role.SITE)
    seen: list[int] = []
    failures: list[str] = []
    over = threading.Event()
    with (
        serving(fleet.identity(Role.SUPERLINK, SUPERLINK_NAME)) as superlink,
        superlink.client(site) as client,
    ):

        def poll() -> None:
            while not over.is_set():
                try:
                    response = client.post("/echo", content=b"x" * 1000)
                    serial, size = response.raise_for_status().text.split()
                    assert size == "1000"
                    if int(serial, 16) not in seen:
                        seen.append(int(serial, 16))
                except (httpx.HTTPError, AssertionError) as error:
                    failures.append(f"{type(error).__name__}: {error}")
                over.wait(0.02)

        poller = threading.Thread(target=poll)
        poller.start()
        follower = follow(site, address(service))
        try:
            wait_until(
                lambda: failures or (seen and seen[-1] in signer.serials[RENEWALS - 1 :]),
                20 * SHORT.total_seconds(),
            )
        finally:
            over.set()
            poller.join(20)
            follower.stop()
    assert failures == []
    # A client that sleeps through a renewal goes on with the one after it, never with one before.
    assert seen == [serial for serial in (first.serial_number, *signer.serials) if serial in seen]
    assert len(seen) > 1
    assert superlink.refused == []
    assert superlink.handshakes == []
    # Each asked with the certificate before it.
    asked = [peer.serial for peer, _ in signer.requests]
    assert asked == [first.serial_number, *signer.serials[: len(asked) - 1]]


def test_certificates_of_this_test_are_renewed_in_time(fleet: Fleet) -> None:
    """The figures the test above rests on."""
    site = fleet.identity(Role.SITE, "site-a")
    made = replace(site, fleet.authority, lifetime=SHORT)
    spare = made.not_valid_after_utc - renew_at(made)
    assert spare == SHORT / 3
    assert made.not_valid_after_utc - made.not_valid_before_utc == SHORT + CLOCK_SKEW


@pytest.fixture
def supernode(fleet: Fleet, service: Serving) -> Iterator[Serving]:
    """Site-a's SuperNode: its guard, its rules and its own certificate; Flower's part answers as ``echo``."""
    own = fleet.identity(Role.SITE, "site-a")
    with serving(
        own, rules=rules(own, echo, address(service), SiteMetrics(own, CollectorRegistry()))
    ) as running:
        yield running


def client_of(running: Serving, identity: Identity) -> httpx.Client:
    server = (identity.peer.federation, Role.SITE, "site-a")
    return httpx.Client(base_url=running.url, verify=client_context(identity, server), timeout=20)


def post(running: Serving, identity: Identity, **options: object) -> httpx.Response:
    with client_of(running, identity) as client:
        return client.post(RENEW_PATH, **options)  # type: ignore[arg-type]


def csr(identity: Identity) -> str:
    peer = identity.peer
    return signing_request(load_key(identity.key), peer.federation, peer.role, peer.name)


@pytest.fixture
def superexec(fleet: Fleet) -> Identity:
    return fleet.identity(Role.SUPEREXEC, "site-a")


def test_a_superexec_renews_through_its_supernode(
    superexec: Identity, supernode: Serving, signer: Signer
) -> None:
    old = load_key(superexec.key).public_key()
    renewed = renew(superexec, address(supernode))
    assert renewed.peer.uri == "spiffe://test/superexec/site-a"
    assert renewed.peer.serial == signer.serials[-1]
    assert load_key(renewed.key).public_key() != old
    ((asker, request),) = signer.requests
    assert asker.uri == "spiffe://test/site/site-a"
    assert set(request) == {"csr", "role"}
    assert request["role"] == "superexec"
    # And again, with the new one.
    assert renew(renewed, address(supernode)).peer.serial == signer.serials[-1]


def test_a_superexec_is_followed_through_its_supernode(
    fleet: Fleet,
    superexec: Identity,
    supernode: Serving,
    signer: Signer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        backdate(patch, timedelta(minutes=45))
        replace(superexec, fleet.authority, lifetime=timedelta(hours=1))
    superexec = Identity.load(superexec.directory, Role.SUPEREXEC)
    follower = follow(superexec, address(supernode))
    try:
        wait_until(lambda: load_certificate(superexec.certificate).serial_number in signer.serials)
    finally:
        follower.stop()


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (Role.SUPEREXEC, "site-b"),
        (Role.SUPEREXEC, SUPERLINK_NAME),
        (Role.SITE, "site-a"),
        (Role.SITE, "site-b"),
        (Role.OPERATOR, "admin"),
        (Role.SUPERLINK, SUPERLINK_NAME),
    ],
)
def test_nobody_else_renews_through_it(
    fleet: Fleet, supernode: Serving, signer: Signer, role: Role, name: str
) -> None:
    other = fleet.identity(role, name)
    assert post(supernode, other, json={"csr": csr(other)}).status_code == 404
    assert [refused["reason"] for refused in supernode.refused] == ["role"]
    assert signer.requests == []


@pytest.mark.parametrize(
    ("given", "detail"),
    [
        (answer(403, code="role", detail="No."), "No."),
        (answer(400, code="proof", detail="A renewal is for a new key."), "for a new key"),
        ((429, {"retry-after": "7"}, b'{"code": "busy", "detail": "Later."}'), "Later."),
        ((502, {}, b"<html>"), "no reason given"),
    ],
)
def test_an_answer_is_passed_on_as_it_is(
    superexec: Identity, supernode: Serving, signer: Signer, given: Answer, detail: str
) -> None:
    signer.fault = lambda _request, _peer: given
    response = post(supernode, superexec, json={"csr": csr(superexec)})
    status, headers, body = given
    assert (response.status_code, response.content) == (status, body)
    assert response.headers.get("retry-after") == headers.get("retry-after")
    before = superexec.certificate.read_bytes()
    with pytest.raises(ConnectionRefusedByFleetError, match=rf"\({status}\): .*{detail}"):
        renew(superexec, address(supernode))
    assert superexec.certificate.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"content": b""}, 400, "malformed"),
        ({"content": b"\xff"}, 400, "malformed"),
        ({"content": b"[" * 10000}, 400, "malformed"),
        ({"json": []}, 400, "malformed"),
        ({"json": {"csr": 1}}, 400, "malformed"),
        # Neither the role nor the name is the SuperExec's to choose.
        ({"json": {"csr": "x", "role": "site"}}, 400, "malformed"),
        ({"content": b"x" * (MAX_BODY_BYTES + 1)}, 413, "too-large"),
    ],
)
def test_what_is_no_renewal_is_not_passed_on(
    superexec: Identity,
    supernode: Serving,
    signer: Signer,
    options: dict[str, object],
    status: int,
    code: str,
) -> None:
    response = post(supernode, superexec, **options)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.json()["detail"]
    assert signer.requests == []


def test_a_renewal_is_a_post(superexec: Identity, supernode: Serving) -> None:
    with client_of(supernode, superexec) as client:
        assert client.get(RENEW_PATH).status_code == 405


def test_one_renewal_is_on_its_way_at_a_time(
    superexec: Identity, supernode: Serving, signer: Signer
) -> None:
    """The training code may ask in a loop: it keeps one thread of the SuperNode busy, not all."""
    busy: list[httpx.Response] = []

    def meanwhile(_request: object, _peer: object) -> None:
        # The service answers the first when a second has been turned away.
        deadline = time.monotonic() + 20
        while not busy and time.monotonic() < deadline:
            time.sleep(0.01)

    signer.fault = meanwhile
    request = {"csr": csr(superexec)}
    answers: list[httpx.Response] = []
    first = threading.Thread(
        target=lambda: answers.append(post(supernode, superexec, json=request))
    )
    first.start()
    wait_until(lambda: signer.requests)
    busy.append(post(supernode, superexec, json=request))
    first.join(30)
    assert (busy[0].status_code, busy[0].json()["code"]) == (429, "busy")
    assert busy[0].headers["retry-after"] == "1"
    assert [response.status_code for response in answers] == [200]


def test_a_service_that_does_not_answer_is_named(
    fleet: Fleet, superexec: Identity, free_port: Callable[[], int]
) -> None:
    own, port = fleet.identity(Role.SITE, "site-a"), free_port()
    with serving(
        own, rules=rules(own, echo, f"localhost:{port}", SiteMetrics(own, CollectorRegistry()))
    ) as running:
        response = post(running, superexec, json={"csr": csr(superexec)})
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert f"localhost:{port} does not renew certificates" in response.json()["detail"]


def test_a_supernode_that_knows_no_service_says_so(fleet: Fleet, superexec: Identity) -> None:
    own = fleet.identity(Role.SITE, "site-a")
    with (
        serving(
            own, rules=rules(own, echo, None, SiteMetrics(own, CollectorRegistry()))
        ) as running,
        pytest.raises(
            ConnectionRefusedByFleetError,
            match=r"\(404\): this SuperNode does not know the enrolment service; start it with --en",
        ),
    ):
        renew(superexec, address(running))


def test_work_goes_past_it(superexec: Identity, supernode: Serving) -> None:
    with client_of(supernode, superexec) as client:
        assert client.post("/v1/runtime/acquire-task").text == f"{superexec.peer.serial:x} 0"
        assert client.post("/v1/renew/x").status_code == 404
        assert json.loads(client.post("/v1/renewal").content)["code"] == 40400
