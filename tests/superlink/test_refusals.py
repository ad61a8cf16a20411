"""Who the running SuperLink refuses: everybody without the right certificate on the right path."""

import contextlib
import http.client
import shutil
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.files import load_key, pem_certificate, pem_key
from certs.identity import (
    authority_directory,
    ensure_identity,
    publish_crl,
)
from certs.roles import Role, subject
from tests.federation import Running, node_header
from tests.wire import ask, context

pytestmark = pytest.mark.federation

# Which role may use which API; every other pair must be refused.
ALLOWED = {"fleet": Role.SITE, "control": Role.OPERATOR, "runtime": Role.SUPEREXEC}

# The enrolment service admits and evicts sites, and does nothing else with Flower.
REGISTRATION = {f"/v1/control/{name}-node" for name in ("register", "unregister")}
REGISTRATION.add("/v1/control/list-nodes")
# Paths of our own beside Flower's.
OWN = {
    "/v1/link": {Role.SITE},
    "/v1/crl": {Role.ENROLMENT},
    "/v1/sites": {Role.SITE, Role.SUPEREXEC, Role.OPERATOR, Role.MONITOR, Role.ENROLMENT},
}


def api_paths() -> list[str]:
    """Every path Flower serves, its documentation among them."""
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app

    return sorted({str(route.path) for route in iter_route_contexts(create_app().routes)})


def test_the_right_roles_pass(superlink: Running) -> None:
    """Without this, refusing everything would pass every other test here."""
    site = superlink.identity(Role.SITE, "site-a")
    answers = {
        "fleet": superlink.ask("/v1/fleet/activate-node", site, headers=node_header(site)),
        "control": superlink.ask(
            "/v1/control/list-nodes", superlink.identity(Role.OPERATOR, "admin")
        ),
        "runtime": superlink.ask(
            "/v1/runtime/acquire-task", superlink.identity(Role.SUPEREXEC, "superlink")
        ),
        "metrics": superlink.ask(
            "/metrics", superlink.identity(Role.MONITOR, "prometheus"), method="GET"
        ),
        "health": superlink.ask(
            "/health", superlink.identity(Role.SUPERLINK, "superlink"), method="GET"
        ),
        "registration": superlink.ask(
            "/v1/control/list-nodes", superlink.identity(Role.ENROLMENT, "enrolment")
        ),
    }
    for api, answer in answers.items():
        assert answer.status is not None, f"{api}: {answer.error}"
        assert not answer.refused, f"{api}: {answer}"
    assert answers["metrics"].status == answers["health"].status == 200
    assert b'vlafleet_site_online{site="site-b"} 0.0' in answers["metrics"].body


def self_signed(superlink: Running, directory: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = subject("test", Role.OPERATOR, "admin")
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier("spiffe://test/operator/admin")]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    (directory / "tls.key").write_bytes(pem_key(key))
    (directory / "tls.crt").write_bytes(pem_certificate(certificate))
    return directory


def wrong_authority(superlink: Running, directory: Path) -> Path:
    """Another authority of the same federation name, role and holder."""
    foreign = Authority.init(directory / "ca", "test")
    ensure_identity(foreign, directory / "id", Role.OPERATOR, "admin")
    return directory / "id"


def expired(superlink: Running, directory: Path) -> Path:
    authority = Authority.load(authority_directory(superlink.pki))
    shutil.copytree(superlink.identity(Role.OPERATOR, "admin"), directory, dirs_exist_ok=True)
    key = load_key(directory / "tls.key").public_key()
    old = authority.issue(key, Role.OPERATOR, "admin", lifetime=timedelta(seconds=-1))
    (directory / "tls.crt").write_bytes(pem_certificate(old))
    return directory


def superlinks_own(superlink: Running, directory: Path) -> Path:
    return superlink.identity(Role.SUPERLINK, "superlink")


@pytest.mark.parametrize(
    "path", ["/v1/control/list-nodes", "/v1/fleet/pull-messages", "/v1/runtime/acquire-task"]
)
@pytest.mark.parametrize("make", [self_signed, wrong_authority, expired])
def test_certificates_that_do_not_verify(
    superlink: Running, tmp_path: Path, make: Callable[[Running, Path], Path], path: str
) -> None:
    answer = superlink.ask(path, make(superlink, tmp_path))
    assert answer.refused_by_tls, answer


@pytest.mark.parametrize(
    "path",
    [
        *("/docs", "/openapi.json", "/health", "/metrics", "/v1/runtime/acquire-task"),
        *("/v1/control/register-node", "/v1/control/list-nodes", "/v1/fleet/register-node"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_certificate(superlink: Running, path: str, method: str) -> None:
    """Stock Flower answers AcquireTask, RegisterNode, /docs and /openapi.json to anybody."""
    answer = superlink.ask(path, None, method=method)
    assert answer.refused_by_tls, answer


@pytest.mark.parametrize("path", ["/v1/control/list-nodes", "/health", "/docs"])
def test_plain_http(superlink: Running, path: str) -> None:
    answer = ask(superlink.port, path, None)
    assert answer.refused_by_tls, answer


def test_old_tls(superlink: Running) -> None:
    old = context(superlink.authority, superlink.identity(Role.OPERATOR, "admin"))
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert ask(superlink.port, "/v1/control/list-nodes", old).refused_by_tls


def test_every_wrong_role_on_every_path(superlink: Running) -> None:
    holders = {
        Role.SITE: superlink.identity(Role.SITE, "site-a"),
        Role.OPERATOR: superlink.identity(Role.OPERATOR, "admin"),
        Role.SUPEREXEC: superlink.identity(Role.SUPEREXEC, "superlink"),
        Role.MONITOR: superlink.identity(Role.MONITOR, "prometheus"),
        Role.SUPERLINK: superlink.identity(Role.SUPERLINK, "superlink"),
        Role.ENROLMENT: superlink.identity(Role.ENROLMENT, "enrolment"),
    }
    paths = [*api_paths(), *OWN]
    for expected in (
        "/docs",
        "/openapi.json",
        "/v1/runtime/acquire-task",
        "/v1/control/register-node",
    ):
        assert expected in paths, f"{expected} not among Flower's {len(paths)} paths"
    let_through = []
    for path in paths:
        api = path.split("/")[2] if path.startswith("/v1/") else None
        for role, identity in holders.items():
            allowed = ALLOWED.get(api or "") is role
            allowed |= path == "/health" and role in {Role.SUPERLINK, Role.MONITOR}
            allowed |= path in REGISTRATION and role is Role.ENROLMENT
            allowed = role in OWN[path] if path in OWN else allowed
            if allowed:
                continue
            method = "POST" if api else "GET"
            headers = node_header(identity) if role is Role.SITE else {}
            if not superlink.ask(path, identity, method=method, headers=headers).refused_by_guard:
                let_through.append((path, role))
    assert let_through == []
    assert sum(path.startswith("/v1/") for path in paths) > 30, paths


@pytest.mark.parametrize(
    "path", ["/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes", "//v1/x"]
)
def test_paths_that_pretend(superlink: Running, path: str) -> None:
    site = superlink.identity(Role.SITE, "site-a")
    answer = superlink.ask(path, site, headers=node_header(site))
    assert answer.status in {404, 405}, answer
    assert b"nodes" not in answer.body


@pytest.mark.parametrize(
    "method", ["/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/v1/fleet/register-node"]
)
@pytest.mark.parametrize("key", ["another site's", "unregistered", "garbled", "none"])
def test_a_site_speaks_for_its_own_key_only(
    superlink: Running, method: str, key: str, tmp_path: Path
) -> None:
    site = superlink.identity(Role.SITE, "site-a")
    headers = {
        "another site's": node_header(superlink.identity(Role.SITE, "site-b")),
        "unregistered": _fresh_node_key(superlink, tmp_path),
        "garbled": {"flwr-public-key": "not base64!"},
        "none": {},
    }[key]
    answer = superlink.ask(method, site, headers=headers)
    assert answer.refused_by_guard, answer
    wanted = "another site's key" if key == "another site's" else "unregistered key"
    line = superlink.log.read_text().rstrip().splitlines()[-1]
    assert "role=site name=site-a" in line
    assert f"reason={wanted}" in line


def _fresh_node_key(superlink: Running, directory: Path) -> dict[str, str]:
    authority = Authority.load(authority_directory(superlink.pki))
    ensure_identity(authority, directory / "stranger", Role.SITE, "stranger")
    return node_header(directory / "stranger")


def test_a_sites_superexec_has_no_business_here(superlink: Running) -> None:
    answer = superlink.ask("/v1/runtime/acquire-task", superlink.identity(Role.SUPEREXEC, "site-a"))
    assert answer.refused_by_guard


def test_another_federation(superlink: Running, tmp_path: Path) -> None:
    """A certificate of our own key whose URI names another federation (an authority that served two)."""
    authority = Authority.load(authority_directory(superlink.pki))
    other = Authority(authority.directory, "elsewhere")
    ensure_identity(other, tmp_path / "id", Role.OPERATOR, "admin")
    assert superlink.ask("/v1/control/list-nodes", tmp_path / "id").refused_by_tls


def test_revocation_is_live_and_cuts_open_connections(superlink: Running, tmp_path: Path) -> None:
    """The one that asks meets a refusal or the end of its connection, the one that is idle the end of it."""
    authority = Authority.load(authority_directory(superlink.pki))
    ensure_identity(authority, tmp_path / "id", Role.OPERATOR, "leaver")
    tls = context(superlink.authority, tmp_path / "id")
    asking, idle = (
        http.client.HTTPSConnection("localhost", superlink.port, timeout=20, context=tls)
        for _ in range(2)
    )

    def is_served(connection: http.client.HTTPSConnection) -> bool:
        headers = {"content-type": "application/x-protobuf"}
        try:
            connection.request("POST", "/v1/control/list-nodes", headers=headers)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            return False
        return response.status != 404

    with contextlib.closing(asking), contextlib.closing(idle):
        assert is_served(asking)
        idle.connect()
        authority.revoke(Role.OPERATOR, "leaver")
        publish_crl(superlink.pki, authority)
        deadline = time.monotonic() + 10
        while is_served(asking):
            assert time.monotonic() < deadline, "still answered 10 s after the revocation"
            time.sleep(0.2)
        # A reset will do; TimeoutError, when it stays open, is another class.
        with contextlib.suppress(ConnectionError):
            assert idle.sock.recv(1) == b""
    assert superlink.ask("/v1/control/list-nodes", tmp_path / "id").refused_by_tls
    assert not superlink.ask(
        "/v1/control/list-nodes", superlink.identity(Role.OPERATOR, "admin")
    ).refused
    assert "name=leaver" in superlink.log.read_text()


def test_refusals_are_counted(superlink: Running) -> None:
    superlink.ask("/v1/control/list-nodes", superlink.identity(Role.MONITOR, "prometheus"))
    superlink.ask("/health", None, method="GET")
    metrics = superlink.ask(
        "/metrics", superlink.identity(Role.MONITOR, "prometheus"), method="GET"
    ).body.decode()
    assert (
        'vlafleet_refused_requests_total{api="/v1/control/",reason="role",role="monitor"}'
        in metrics
    )
    assert 'vlafleet_failed_handshakes_total{reason="no certificate"}' in metrics
