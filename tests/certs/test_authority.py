"""The authority: what it issues, what it refuses to replace, what it revokes."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.authority import ONLY_NAMES, SERVERS, Authority
from certs.errors import CertificateError
from certs.files import load_certificate, load_key, pem_certificate
from certs.identity import Identity, ensure_identity
from certs.lifetime import LIFETIMES
from certs.roles import Peer, Role


@pytest.fixture
def fresh(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", "lab")


def name_of(role: Role) -> str:
    return ONLY_NAMES.get(role, "one")


@pytest.mark.parametrize("role", list(Role))
def test_issued_certificate_says_who_holds_it(fresh: Authority, tmp_path: Path, role: Role) -> None:
    hosts = ["localhost"] if role in SERVERS else []
    assert ensure_identity(fresh, tmp_path / "id", role, name_of(role), hosts) == "issued"
    identity = Identity.load(tmp_path / "id", role)
    certificate = load_certificate(tmp_path / "id" / "tls.crt")
    assert identity.peer == Peer("lab", role, name_of(role), certificate.serial_number)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert ExtendedKeyUsageOID.CLIENT_AUTH in usage
    assert (ExtendedKeyUsageOID.SERVER_AUTH in usage) == (role in SERVERS)
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    lifetime = certificate.not_valid_after_utc - datetime.now(UTC)
    assert abs(lifetime - LIFETIMES[role]) < timedelta(minutes=1)
    for key in tmp_path.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600, key


def test_rerun_keeps_keys_and_certificates(fresh: Authority, tmp_path: Path) -> None:
    directory = tmp_path / "id"
    ensure_identity(fresh, directory, Role.SITE, "lab-1", ["localhost"])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    again = Authority.init(tmp_path / "ca", "lab")
    assert ensure_identity(again, directory, Role.SITE, "lab-1", ["localhost"]) == "kept"
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("reason", ["near expiry", "revoked", "another host"])
def test_certificate_is_issued_again_for_the_same_key(
    fresh: Authority, tmp_path: Path, reason: str
) -> None:
    directory = tmp_path / "id"
    hosts = ["localhost"]
    ensure_identity(fresh, directory, Role.SITE, "lab-1", hosts)
    key = load_key(directory / "tls.key")
    if reason == "near expiry":
        short = fresh.issue(
            key.public_key(), Role.SITE, "lab-1", hosts=hosts, lifetime=timedelta(seconds=60)
        )
        (directory / "tls.crt").write_bytes(pem_certificate(short))
    elif reason == "revoked":
        fresh.revoke(Role.SITE, "lab-1")
    else:
        hosts = ["localhost", "lab-1.example"]
    assert ensure_identity(fresh, directory, Role.SITE, "lab-1", hosts) == "issued"
    assert load_key(directory / "tls.key").private_numbers() == key.private_numbers()
    Identity.load(directory, Role.SITE)


def test_interrupted_init_is_finished(tmp_path: Path) -> None:
    Authority.init(tmp_path / "ca", "lab")
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    (tmp_path / "ca" / "ca.crt").unlink()
    Authority.init(tmp_path / "ca", "lab")
    assert (tmp_path / "ca" / "ca.key").read_bytes() == key


def test_another_federations_directory_is_refused(fresh: Authority) -> None:
    with pytest.raises(CertificateError, match="holds the authority of 'lab', not of 'other'"):
        Authority.init(fresh.directory, "other")


def test_another_holders_directory_is_refused(fresh: Authority, tmp_path: Path) -> None:
    ensure_identity(fresh, tmp_path / "id", Role.SITE, "lab-1")
    with pytest.raises(CertificateError, match="holds the identity spiffe://lab/site/lab-1"):
        ensure_identity(fresh, tmp_path / "id", Role.SITE, "lab-2")


@pytest.mark.parametrize("name", ["", "Lab", "a b", "../x", "-a", "a" * 64, "a/b", "ä", "a\n"])
def test_bad_names_are_refused(fresh: Authority, name: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(CertificateError, match="not allowed"):
        fresh.issue(key, Role.SITE, name)


def test_hosts_only_for_servers(fresh: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(CertificateError, match="serves nothing"):
        fresh.issue(key, Role.OPERATOR, "admin", hosts=["localhost"])


def test_revocation_lists_every_certificate_of_the_holder(fresh: Authority, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    first, second = (fresh.issue(key, Role.SITE, "lab-1") for _ in range(2))
    other = fresh.issue(key, Role.SITE, "lab-2")
    assert len(fresh.revoke(Role.SITE, "lab-1")) == 2
    assert fresh.revoke(Role.SITE, "lab-1") == []
    crl = x509.load_pem_x509_crl(fresh.crl.read_bytes())
    revoked = {entry.serial_number for entry in crl}
    assert revoked == {first.serial_number, second.serial_number}
    assert other.serial_number not in revoked
    states = {
        line.serial: line.state(datetime.now(UTC))
        for line in Authority.load(fresh.directory).issued()
    }
    assert states[first.serial_number] == "revoked"
    assert states[other.serial_number] == "valid"


def test_revoking_a_stranger_is_an_error(fresh: Authority) -> None:
    with pytest.raises(CertificateError, match="no certificate was issued to site 'nobody'"):
        fresh.revoke(Role.SITE, "nobody")


def test_uri_and_subject_must_agree(fresh: Authority) -> None:
    """A certificate whose subject says operator and whose URI says site speaks for nobody."""
    key = load_key(fresh.directory / "ca.key")
    from cryptography.hazmat.primitives import hashes

    from certs.roles import subject

    now = datetime.now(UTC)
    mixed = (
        x509.CertificateBuilder()
        .subject_name(subject("lab", Role.OPERATOR, "one"))
        .issuer_name(fresh.certificate.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://lab/site/one")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(CertificateError, match="different holders"):
        Peer.of(mixed)
