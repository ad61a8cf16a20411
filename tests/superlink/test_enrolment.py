"""The enrolment service's answers: who is let in with what, and that a refusal writes nothing."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from certs.enrolment import MAX_BODY_BYTES, Application, signing_request
from certs.errors import CertificateError
from certs.roles import Peer, Role
from superlink.endpoint import strict_json
from superlink.limits import REQUESTS
from superlink.refused import Refused
from tests.enrolling import FEDERATION, Keys, Service, enrolment, new_key


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


def resigned(application: dict[str, str], keys: Keys, **changes: str) -> dict[str, str]:
    """The application with changes that the SuperNode key signs: only what was changed can be refused."""
    changed = Application(**{**application, **changes, "proof": ""})
    signature = keys.node.sign(changed._signed(), ec.ECDSA(hashes.SHA256()))
    return {**changed.to_json(), "proof": base64.b64encode(signature).decode()}


def openssh(key: Any) -> str:
    public = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return str(public.decode())


def wrong_curve_csr(_keys: Keys) -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    return signing_request(key, FEDERATION, Role.SITE, "site-c")


def rsa_csr(_keys: Keys) -> str:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def forged_csr(keys: Keys) -> str:
    """Another's key in it, signed by our own."""
    texts = [signing_request(key, FEDERATION, Role.SITE, "site-c") for key in (keys.tls, new_key())]
    ours, theirs = (x509.load_pem_x509_csr(csr.encode()) for csr in texts)
    if len(ours.signature) != len(theirs.signature):  # 70 to 72 bytes; in place, it must fit
        return forged_csr(keys)
    der = theirs.public_bytes(serialization.Encoding.DER).replace(theirs.signature, ours.signature)
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


# What is sent for an honest enrolment, the code that it must get, the start of the sentence.
Case = Callable[[dict[str, Any], Keys], Any]
MALFORMED: list[tuple[str, str, Case]] = [
    ("malformed", "the body is an object of", lambda _body, _keys: []),
    ("malformed", "the body is an object of", lambda _body, _keys: None),
    ("malformed", "the body is an object of", lambda body, _keys: {**body, "more": 1}),
    ("malformed", "the body is an object of", lambda _body, _keys: {"application": 1}),
    ("malformed", "an invitation is 16 bytes", lambda body, _keys: {**body, "invitation": "AAAA"}),
    ("malformed", "an invitation is 16 bytes", lambda body, _keys: {**body, "invitation": 7}),
    (
        "malformed",
        "an invitation is 16 bytes",
        lambda body, _keys: {**body, "invitation": "é" * 22},
    ),
    (
        "malformed",
        "an invitation is 16 bytes",
        lambda body, _keys: {**body, "invitation": "!" * 22},
    ),
    # The same bytes, written with another last character.
    (
        "malformed",
        "an invitation is 16 bytes",
        lambda body, _keys: {**body, "invitation": "A" * 21 + "B"},
    ),
    ("malformed", "an application has the", lambda body, _keys: {**body, "application": {}}),
    ("malformed", "an application has the", lambda body, _keys: {**body, "application": "x"}),
]
CHANGED: list[tuple[str, str, Callable[[dict[str, str], Keys], dict[str, Any]]]] = [
    ("malformed", "an application's csr is", lambda form, _keys: {**form, "csr": 5}),
    ("malformed", "an application has the", lambda form, _keys: {**form, "role": "operator"}),
    ("malformed", "a site cannot be named", lambda form, _keys: {**form, "site": "superlink"}),
    ("malformed", "site name '../ca' is not", lambda form, _keys: {**form, "site": "../ca"}),
    ("malformed", "federation name", lambda form, _keys: {**form, "federation": "x" * 9000}),
    (
        "federation",
        "this is the federation",
        lambda _form, keys: keys.application("site-c", "other"),
    ),
    ("proof", "the SuperNode key's proof", lambda form, _keys: {**form, "proof": ""}),
    ("proof", "the SuperNode key's proof", lambda form, _keys: {**form, "proof": "%%"}),
    ("proof", "the SuperNode key's proof", lambda form, _keys: {**form, "proof": "QUJD"}),
    ("proof", "the SuperNode key's proof", lambda form, _keys: {**form, "site": "site-d"}),
    (
        "proof",
        "the SuperNode key's proof",
        lambda form, _keys: {**form, "node_key": openssh(new_key().public_key())},
    ),
    ("proof", "this is not a PEM request", lambda form, keys: resigned(form, keys, csr="x")),
    ("proof", "this is not a PEM request", lambda form, keys: resigned(form, keys, csr="\ud800")),
    (
        "proof",
        "this is not a PEM request",
        lambda form, keys: resigned(form, keys, superexec_csr=form["csr"][:200]),
    ),
    (
        "proof",
        "a federation's keys are on the curve",
        lambda form, keys: resigned(form, keys, csr=wrong_curve_csr(keys)),
    ),
    (
        "proof",
        "a federation's keys are on the curve",
        lambda form, keys: resigned(form, keys, csr=rsa_csr(keys)),
    ),
    (
        "proof",
        "the request for a certificate is not signed",
        lambda form, keys: resigned(form, keys, csr=forged_csr(keys)),
    ),
    (
        "proof",
        "the application uses one key",
        lambda form, keys: resigned(form, keys, superexec_csr=form["csr"]),
    ),
    ("proof", "the SuperNode key is not an", lambda form, keys: resigned(form, keys, node_key="x")),
    (
        "proof",
        "a SuperNode key is on the curve",
        lambda form, keys: resigned(
            form, keys, node_key=openssh(ec.generate_private_key(ec.SECP384R1()).public_key())
        ),
    ),
]
CASES: list[tuple[str, str, Case]] = [
    *MALFORMED,
    *(
        (
            code,
            detail,
            lambda body, keys, change=change: {
                **body,
                "application": change(body["application"], keys),
            },
        )
        for code, detail, change in CHANGED
    ),
]


def refused(
    service: Service, body: Any, code: str, status: int, detail: str, keys: Keys | None = None
) -> None:
    """Send an enrolment that must be refused, be audited, and change nothing."""
    before, lines = service.written(), len(service.events())
    reply = service.ask("POST", "/v1/enrol", body)
    assert (reply.status, reply.body["code"]) == (status, code), reply.body
    assert reply.body["detail"].startswith(detail), reply.body
    assert len(reply.body["detail"]) <= 300
    assert service.written() == before
    [line] = service.events()[lines:]
    assert (line["event"], line["reason"]) == ("enrolment-refused", code)
    assert line["address"] == "192.0.2.7"


@pytest.mark.parametrize(("code", "detail", "change"), CASES)
def test_what_is_not_an_enrolment(service: Service, code: str, detail: str, change: Case) -> None:
    keys = Keys()
    secret = service.invite("site-c")
    body = enrolment(secret, keys.application("site-c"))
    refused(service, change(body, keys), code, 400, detail)
    # The invitation is as good as before.
    assert service.ask("POST", "/v1/enrol", body).status == 200


def test_an_invited_site_comes_in(service: Service) -> None:
    keys = Keys()
    secret = service.invite("site-c")
    reply = service.enrol(secret, "site-c", keys)
    assert reply.status == 200
    membership = reply.body
    assert membership["authority"].encode() == service.authority.bundle
    assert membership["superlink"] == "fleet.example:9092"
    assert membership["enrolment"] == "fleet.example:9093"
    expected = {
        "certificate": (Role.SITE, keys.tls, {"localhost", "site-c", "supernode"}),
        "superexec_certificate": (Role.SUPEREXEC, keys.superexec, set()),
    }
    for name, (role, key, hosts) in expected.items():
        certificate = x509.load_pem_x509_certificate(membership[name].encode())
        certificate.verify_directly_issued_by(service.authority.certificate)
        peer = Peer.of(certificate)
        assert (peer.federation, peer.role, peer.name) == (FEDERATION, role, "site-c")
        assert certificate.public_key() == key.public_key()
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert set(names.get_values_for_type(x509.DNSName)) == hosts
    assert service.register.alive() == ["site-c"]
    invited, enrolled = service.events()
    assert (invited["event"], invited["role"], invited["site"]) == ("invited", "operator", "site-c")
    assert (enrolled["event"], enrolled["site"]) == ("enrolled", "site-c")
    assert enrolled["invitation"] == invited["invitation"]
    text = service.audit.read_text()
    assert secret.hex() not in text
    assert base64.urlsafe_b64encode(secret).decode().rstrip("=") not in text


def test_a_lost_answer_can_be_asked_for_again(service: Service) -> None:
    keys = Keys()
    secret = service.invite("site-c")
    first, second = (service.enrol(secret, "site-c", keys) for _ in range(2))
    assert first.status == second.status == 200
    assert service.register.alive() == ["site-c"]
    other = enrolment(secret, Keys().application("site-c"))
    refused(service, other, "used", 409, "the invitation was used by another machine")


def test_invitations_that_are_over(service: Service) -> None:
    form = Keys().application("site-c")
    cancelled = service.invite("site-c")
    assert service.operator("DELETE", "/v1/invitations/site-c").body == {"cancelled": 1}
    refused(service, enrolment(cancelled, form), "cancelled", 410, "the invitation was cancelled")
    expired = service.invite("site-c", 60)
    service.invitations._clock = lambda: 2**33
    refused(service, enrolment(expired, form), "expired", 410, "the invitation has expired")
    refused(service, enrolment(bytes(16), form), "unknown", 400, "this federation does not know")
    other = service.invite("site-d")
    refused(service, enrolment(other, form), "site", 400, "the invitation is for another site")


def test_another_machine_under_the_name(service: Service) -> None:
    service.enrol(service.invite("site-c"), "site-c", Keys())
    reply = service.operator("POST", "/v1/invitations", site="site-c", valid_seconds=60)
    assert reply.body["member"] is True
    body = enrolment(service.invite("site-c"), Keys().application("site-c"))
    refused(service, body, "member", 409, "another machine is the site site-c")


def test_a_supernode_key_of_another_site(service: Service) -> None:
    keys = Keys()
    service.enrol(service.invite("site-c"), "site-c", keys)
    body = enrolment(service.invite("site-d"), Keys(node=keys.node).application("site-d"))
    refused(service, body, "member", 409, "this SuperNode key belongs to the site 'site-c'")


def test_a_supernode_key_that_was_unregistered(service: Service) -> None:
    keys = Keys()
    service.enrol(service.invite("site-c"), "site-c", keys)
    assert service.operator("POST", "/v1/revoke", site="site-c").body == {
        "certificates": 2,
        "unregistered": True,
        "invitations": 0,
    }
    body = enrolment(service.invite("site-c"), keys.application("site-c"))
    refused(service, body, "retired-key", 409, "the SuperNode key of site-c was unregistered")
    # With a new one the evicted site is back.
    fresh = Keys(keys.tls, keys.superexec)
    assert service.enrol(service.invite("site-c"), "site-c", fresh).status == 200


def test_without_a_superlink_the_invitation_stays_good(service: Service) -> None:
    keys = Keys()
    secret = service.invite("site-c")
    service.register.reachable = False
    body = enrolment(secret, keys.application("site-c"))
    refused(service, body, "unavailable", 503, "no SuperLink of this federation answers")
    service.register.reachable = True
    assert service.ask("POST", "/v1/enrol", body).status == 200


@pytest.mark.parametrize("step", ["issue", "use"])
def test_a_failure_between_registering_and_answering(
    service: Service, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The disk is full, or the process ends: these keys come in later, other keys do not."""
    keys = Keys()
    secret = service.invite("site-c")

    def fail(*_arguments: object, **_options: object) -> None:
        raise CertificateError("the disk is full; free some of it")

    with monkeypatch.context() as patch:
        if step == "issue":
            patch.setattr("certs.authority.Authority.issue", fail)
        else:
            patch.setattr("superlink.invitations.Invitations.use", fail)
        reply = service.enrol(secret, "site-c", keys)
        assert (reply.status, reply.body["code"]) == (503, "unavailable")
        assert "disk" not in reply.body["detail"]
    assert service.register.alive() == ["site-c"]
    service.start()
    other = service.enrol(secret, "site-c", Keys())
    assert (other.status, other.body["code"]) == (409, "member")
    assert service.enrol(secret, "site-c", keys).status == 200
    assert service.register.alive() == ["site-c"]


def test_approving_a_file(service: Service) -> None:
    keys = Keys()
    reply = service.operator("POST", "/v1/approve", **keys.application("site-c"))
    assert reply.status == 200
    assert set(reply.body) >= {"certificate", "superexec_certificate", "authority"}
    assert service.register.alive() == ["site-c"]
    [line] = service.events()
    assert (line["event"], line["role"], line["site"]) == ("approved", "operator", "site-c")
    again = service.operator("POST", "/v1/approve", **Keys().application("site-c"))
    assert (again.status, again.body["code"]) == (409, "member")
    altered = {**keys.application("site-c"), "site": "site-d"}
    assert service.operator("POST", "/v1/approve", **altered).body["code"] == "proof"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"site": "site-c", "valid_seconds": NaN}',
        b'{"site": "site-c", "valid_seconds": 3600.0}',
        b'{"site": "site-c", "valid_seconds": 1e999}',
        b'{"site": "site-c", "valid_seconds": true}',
        b'{"site": "site-c", "valid_seconds": "3600"}',
        b'{"site": "site-c", "valid_seconds": 59}',
        b'{"site": "site-c", "valid_seconds": 604801}',
        b'{"site": "site-c", "valid_seconds": ' + b"9" * 5000 + b"}",
        b'{"site": "superlink", "valid_seconds": 3600}',
        b'{"site": 1, "valid_seconds": 3600}',
        b'{"site": "a", "site": "site-c", "valid_seconds": 3600}',
        b'{"site": "site-c"}',
        b'{"site": "site-c", "valid_seconds": 3600, "more": 1}',
        b"[" * 16000,
        b'{"a":' * 3000,
    ],
)
def test_invitations_are_asked_for_strictly(service: Service, body: bytes) -> None:
    before = service.written()
    reply = service.ask("POST", "/v1/invitations", body, service.issued(Role.OPERATOR, "admin"))
    assert (reply.status, reply.body["code"]) == (400, "malformed"), reply.body
    after = service.written()
    # Issuing the operator's certificate is the test's own doing.
    assert {path for path in after if after[path] != before.get(path)} <= {
        str(service.directory / "ca" / "issued.jsonl")
    }


@pytest.mark.parametrize("nested", [b"[" * 200_000, b'{"a":' * 100_000])
def test_nesting_does_not_end_the_process(nested: bytes) -> None:
    with pytest.raises(Refused, match="not JSON"):
        strict_json(nested)


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies(service: Service, announced: bool) -> None:
    body = b" " * (MAX_BODY_BYTES + 1)
    headers = [(b"content-length", str(len(body)).encode())] if announced else []
    before = service.written()
    reply = service.ask("POST", "/v1/enrol", body, headers=headers)
    assert (reply.status, reply.body["code"]) == (413, "too-large")
    assert reply.headers[b"connection"] == b"close"
    assert service.written() == before
    assert service.events()[-1]["reason"] == "too-large"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/enrol", b"POST"),
        ("DELETE", "/v1/enrol", b"POST"),
        ("POST", "/v1/authority", b"GET"),
        ("HEAD", "/v1/authority", b"GET"),
        ("PUT", "/v1/invitations", b"POST, GET"),
    ],
)
def test_other_methods(service: Service, method: str, path: str, allowed: bytes) -> None:
    reply = service.ask(method, path, {}, service.issued(Role.OPERATOR, "admin"))
    assert (reply.status, reply.body["code"]) == (405, "malformed")
    assert reply.headers[b"allow"] == allowed
    assert reply.headers[b"connection"] == b"close"


def test_a_flood_is_told_when_to_come_again(service: Service) -> None:
    replies = [service.ask("GET", "/v1/authority") for _ in range(REQUESTS[0].burst + 20)]
    assert [reply.status for reply in replies[: REQUESTS[0].burst]] == [200] * REQUESTS[0].burst
    late = replies[-1]
    assert (late.status, late.body["code"]) == (429, "busy")
    assert 1 <= int(late.headers[b"retry-after"]) <= 30
    # Holders of a certificate are not held up by it.
    assert service.operator("GET", "/v1/invitations").status == 200


def test_the_authority_is_anybodys(service: Service) -> None:
    reply = service.ask("GET", "/v1/authority")
    assert reply.status == 200
    assert reply.body["authority"].encode() == service.authority.bundle
    assert reply.body["federation"] == FEDERATION
    assert isinstance(reply.body["time"], float)


def test_listing_invitations_shows_no_secret(service: Service) -> None:
    service.enrol(service.invite("site-c"), "site-c", Keys())
    secret = service.invite("site-d", 60)
    [used, opened] = service.operator("GET", "/v1/invitations").body["invitations"]
    assert (used["site"], used["state"]) == ("site-c", "used")
    assert (opened["site"], opened["state"]) == ("site-d", "open")
    assert opened["expires"] - opened["created"] == 60
    assert set(opened) == {"site", "id", "created", "expires", "state"}
    assert secret.hex() not in json.dumps([used, opened])


def test_cancelling(service: Service) -> None:
    service.invite("site-c")
    assert service.operator("DELETE", "/v1/invitations/site-c").body == {"cancelled": 1}
    assert service.operator("DELETE", "/v1/invitations/site-c").body == {"cancelled": 0}
    cancelled = [line for line in service.events() if line["event"] == "invitation-cancelled"]
    assert [line["site"] for line in cancelled] == ["site-c"]
    reply = service.operator("DELETE", "/v1/invitations/..")
    assert (reply.status, reply.body["code"]) == (400, "malformed")
