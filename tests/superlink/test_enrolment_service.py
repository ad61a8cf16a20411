"""The enrolment service as a process beside a real SuperLink: who gets in, stays in, and is put out."""

import base64
import json
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from certs.authority import Authority
from certs.enrolment import Membership, signing_request
from certs.errors import InvitationError
from certs.files import pem_certificate
from certs.identity import Identity, store_identity
from certs.roles import Role
from supernode.enrol import RetiredKeyError
from tests.enrolling import FEDERATION, Keys, enrolment, new_key
from tests.enrolment_service import Enrolment, running_enrolment
from tests.federation import node_header
from tests.wire import Answer

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[Enrolment]:
    directory = tmp_path_factory.mktemp("enrolment")
    with running_enrolment(directory, free_port(), free_port()) as running:
        yield running


def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for something that must happen within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def store(directory: Path, keys: Keys, membership: Membership, role: Role = Role.SITE) -> Identity:
    """Write what a site keeps."""
    certificate = membership.certificate if role is Role.SITE else membership.superexec_certificate
    key = keys.tls if role is Role.SITE else keys.superexec
    store_identity(directory, key, certificate, membership.authority)
    public = keys.application(membership.site)["node_key"]
    (directory / "node.pub").write_text(public)
    return Identity.load(directory, role)


def test_from_invitation_to_the_superlink(service: Enrolment, tmp_path: Path) -> None:
    invitation = service.invite("site-c")
    assert (invitation.federation, invitation.site) == (FEDERATION, "site-c")
    assert invitation.address == service.address
    keys = Keys()
    membership = service.enrol(invitation, keys)
    assert membership.superlink == service.superlink.address
    identity = store(tmp_path / "site", keys, membership)
    answer = service.superlink.ask(
        "/v1/fleet/activate-node", identity.directory, headers=node_header(identity.directory)
    )
    assert not answer.refused, answer
    assert service.sites()["site-c"]["state"] in {"registered", "offline"}
    with pytest.raises(InvitationError, match="used by another machine"):
        service.enrol(invitation, Keys())
    with service.client(identity) as client:
        report = {"episodes": 5, "frames": 500, "bytes": 10**6, "fps": 30}
        assert client.put("/v1/dataset", json=report).status_code == 204
        renewal = {"csr": signing_request(new_key(), FEDERATION, Role.SITE, "site-c")}
        assert client.post("/v1/renew", json=renewal).status_code == 200
        # What is the operator's is not the site's.
        for method, path in (
            ("GET", "/v1/sites"),
            ("GET", "/v1/invitations"),
            ("DELETE", "/v1/invitations/site-a"),
            ("POST", "/v1/invitations"),
            ("POST", "/v1/revoke"),
            ("POST", "/v1/approve"),
            ("GET", "/metrics"),
            ("GET", "/health"),
        ):
            assert client.request(method, path).status_code == 404, (method, path)
    assert service.sites()["site-c"]["episodes"] == 5
    refused = [event for event in service.events() if event["event"] == "request-refused"]
    assert {(event["role"], event["name"]) for event in refused} == {("site", "site-c")}


def test_without_a_certificate_there_are_two_paths(service: Enrolment) -> None:
    paths = ("renew", "dataset", "invitations", "sites", "approve", "revoke", "control/list-nodes")
    with service.client(None) as client:
        for path in paths:
            for method in ("GET", "POST", "PUT", "DELETE"):
                assert client.request(method, f"/v1/{path}").status_code == 404, (method, path)
        assert client.get("/metrics").status_code == 404
        assert client.get("/health").status_code == 404
        assert client.get("/v1/authority").json()["federation"] == FEDERATION


def test_only_a_certificate_of_the_federation_is_taken(service: Enrolment, tmp_path: Path) -> None:
    """One that is presented must be good, though none need be."""
    foreign = Authority.init(tmp_path / "ca", FEDERATION)
    key = new_key()
    certificate = foreign.issue(key.public_key(), Role.OPERATOR, "admin")
    store_identity(
        tmp_path / "id", key, pem_certificate(certificate).decode(), foreign.bundle.decode()
    )
    context = ssl.create_default_context(cafile=str(service.superlink.authority))
    context.load_cert_chain(tmp_path / "id" / "tls.crt", tmp_path / "id" / "tls.key")
    with (
        httpx.Client(base_url=f"https://{service.address}", verify=context) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.get("/v1/authority")


def test_evicted_within_seconds_and_back_with_a_new_key(service: Enrolment, tmp_path: Path) -> None:
    keys = Keys()
    identity = store(tmp_path / "site", keys, service.enrol(service.invite("site-e"), keys))
    headers = node_header(identity.directory)

    def ask() -> Answer:
        return service.superlink.ask("/v1/fleet/activate-node", identity.directory, headers=headers)

    assert not ask().refused
    answer = service.operator("POST", "/v1/revoke", {"site": "site-e"})
    assert answer == {"certificates": 2, "unregistered": True, "invitations": 0}
    until(lambda: ask().refused_by_tls, 5)

    def shut_out() -> bool:
        try:
            with service.client(identity) as client:
                return client.get("/v1/authority").status_code == httpx.codes.NOT_FOUND
        except httpx.TransportError:
            return True

    until(shut_out, 5)
    assert service.sites()["site-e"]["state"] == "revoked"
    # Flower never takes an unregistered key back.
    with pytest.raises(RetiredKeyError, match="was unregistered"):
        service.enrol(service.invite("site-e"), keys)
    fresh = Keys()
    back = store(tmp_path / "back", fresh, service.enrol(service.invite("site-e"), fresh))
    welcome = service.superlink.ask(
        "/v1/fleet/activate-node", back.directory, headers=node_header(back.directory)
    )
    assert not welcome.refused, welcome


def test_metrics_and_health(service: Enrolment) -> None:
    with service.client(service.holder(Role.MONITOR, "prometheus")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        text = client.get("/metrics").text
    assert 'vlafleet_invitations{state="open"}' in text
    assert 'vlafleet_enrolments_total{result="enrolled"}' in text
    assert 'vlafleet_certificate_expiry_timestamp_seconds{role="enrolment"}' in text
    with service.client(service.holder(Role.ENROLMENT, "enrolment")) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 404


def test_no_secret_in_any_log(service: Enrolment) -> None:
    secrets = []
    for number in range(5):
        invitation = service.invite(f"secret-{number}")
        secrets.append(invitation)
        service.enrol(invitation, Keys())
        with pytest.raises(InvitationError):
            service.enrol(invitation, Keys())
    logs = [path.read_text() for path in service.superlink.processes.logs.glob("*.log")]
    logs += [path.read_text() for path in service.state.iterdir() if path.is_file()]
    assert sum(map(len, logs)) > 1000
    for invitation in secrets:
        forms = {
            invitation.encode(),
            invitation.secret.hex(),
            base64.urlsafe_b64encode(invitation.secret).decode().rstrip("="),
            base64.b64encode(invitation.secret).decode().rstrip("="),
        }
        assert not [form for form in forms for text in logs if form in text]
    assert not [text for text in logs if "PRIVATE KEY" in text]


def test_a_superlink_that_was_away(service: Enrolment, tmp_path: Path) -> None:
    """An eviction while it is down is answered with what is open, and finished when it is back."""
    keys = Keys()
    identity = store(tmp_path / "site", keys, service.enrol(service.invite("site-f"), keys))
    processes = service.superlink.processes
    superlink = processes.running.pop("superlink")
    superlink.terminate()
    superlink.wait(30)
    with service.client(service.holder(Role.OPERATOR, "admin")) as client:
        answer = client.post("/v1/revoke", json={"site": "site-f"})
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.json()["detail"].startswith("2 certificates and 0 invitations of site-f")
    # Whoever holds a certificate still renews: only the SuperLink is away.
    monitor = service.holder(Role.MONITOR, "prometheus")
    with service.client(monitor) as client:
        request = {"csr": signing_request(new_key(), FEDERATION, Role.MONITOR, "prometheus")}
        assert client.post("/v1/renew", json=request).status_code == 200
    own = service.superlink.identity(Role.SUPERLINK, "superlink")
    processes.start(
        "superlink",
        *("superlink", "--identity", str(own), "--port", str(service.superlink.port)),
        *("--state", str(service.directory / "state")),
    )

    def evicted() -> bool:
        with service.client(service.holder(Role.OPERATOR, "admin")) as client:
            answer = client.get("/v1/sites")
        if answer.status_code != httpx.codes.OK:
            return False
        states = {site["site"]: site["state"] for site in answer.json()["sites"]}
        return states["site-f"] == "revoked" and not _open(service)

    until(evicted, 60)
    refused = service.superlink.ask(
        "/v1/fleet/activate-node", identity.directory, headers=node_header(identity.directory)
    )
    assert refused.refused_by_tls, refused


def _open(service: Enrolment) -> Any:
    return json.loads((service.state / "evictions.json").read_bytes())


def test_a_restart_loses_nothing(service: Enrolment) -> None:
    invitation = service.invite("site-g")
    service.stop()
    service.start()
    keys = Keys()
    first = service.enrol(invitation, keys)
    service.stop()
    service.start()
    again = service.enrol(invitation, keys)
    certificates = [
        x509.load_pem_x509_certificate(each.certificate.encode()) for each in (first, again)
    ]
    assert certificates[0].public_key() == certificates[1].public_key()
    with pytest.raises(InvitationError, match="used"):
        service.enrol(invitation, Keys())


def test_a_crash_between_registering_and_answering(service: Enrolment) -> None:
    """The keys that were registered come in with the invitation later, others do not."""
    keys, invitation = Keys(), service.invite("site-i")
    service.stop()
    service.start(crash("superlink.invitations", "Invitations.use"))
    with service.client(None) as client, pytest.raises(httpx.TransportError):
        client.post("/v1/enrol", json=enrolment(invitation.secret, keys.application("site-i")))
    service.crashed()
    service.start()
    assert service.sites()["site-i"]["state"] == "registered"
    with pytest.raises(InvitationError, match="another machine is the site"):
        service.enrol(invitation, Keys())
    assert service.enrol(invitation, keys).site == "site-i"
    with pytest.raises(InvitationError, match="used by another machine"):
        service.enrol(invitation, Keys())


@pytest.mark.parametrize(
    ("site", "module", "function"),
    [
        ("site-j", "certs.authority", "Authority.revoke"),
        ("site-k", "superlink.members", "Members._unregister"),
    ],
)
def test_a_crash_while_a_site_is_evicted(
    service: Enrolment, site: str, module: str, function: str
) -> None:
    """What was begun is finished by the next process."""
    service.enrol(service.invite(site), Keys())
    service.stop()
    service.start(crash(module, function))
    operator = service.holder(Role.OPERATOR, "admin")
    with service.client(operator) as client, pytest.raises(httpx.TransportError):
        client.post("/v1/revoke", json={"site": site})
    service.crashed()
    assert _open(service) == [site]
    service.start()
    until(lambda: not _open(service), 20)
    assert service.sites()[site]["state"] == "revoked"


def crash(module: str, function: str) -> str:
    """Python that ends the process, at once, where it would call a function."""
    return f"import os, {module} as m\nm.{function} = lambda *_, **__: os._exit(9)\n"


def test_a_second_service_on_the_same_state(
    service: Enrolment, vlafleet: Callable[..., Any], free_port: Callable[[], int]
) -> None:
    own = service.superlink.identity(Role.ENROLMENT, "enrolment")
    common = (
        *("enrolment", "--identity", own, "--superlink", service.superlink.address),
        *("--authority", service.superlink.authority.parent),
    )
    done = vlafleet(*common, "--state", service.state, "--port", free_port())
    assert done.returncode == 19
    assert "another enrolment service works in" in done.stderr
    done = vlafleet(*common, "--state", service.directory / "x", "--port", service.port)
    assert done.returncode == 13
    for arguments, code, sentence in (
        (("--host", "0.0.0.0"), 13, "add --advertise"),  # noqa: S104
        (("--advertise", "nothing"), 13, "is not host:port"),
        (("--advertise", "other.example:9093"), 10, "not for other.example"),
    ):
        done = vlafleet(
            *common, "--state", service.directory / "x", "--port", free_port(), *arguments
        )
        assert done.returncode == code, done.stderr
        assert sentence in done.stderr.replace("\n", " ")
