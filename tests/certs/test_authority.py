"""The authority: what it issues, what it refuses to replace, what it revokes."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.authority import ONLY_NAMES, SERVERS, Authority
from certs.errors import CertificateError
from certs.files import load_certificate, load_key, pem_certificate
from certs.identity import Identity, ensure_identity
from certs.index import Issued, write_index
from certs.lifetime import CLOCK_SKEW, LIFETIMES
from certs.roles import Peer, Role


@pytest.fixture
def fresh(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", "lab")


class Yesterday(datetime):
    """The clock, a day ago."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) - timedelta(days=1)


def name_of(role: Role) -> str:
    return ONLY_NAMES.get(role, "one")


@pytest.mark.parametrize("role", list(Role))
def test_issued_certificate_says_who_holds_it(fresh: Authority, tmp_path: Path, role: Role) -> None:
    hosts = ["localhost"] if role in SERVERS else []
    assert ensure_identity(fresh, tmp_path / "id", role, name_of(role), hosts) == "issued"
    identity = Identity.load(tmp_path / "id", role)
    certificate = load_certificate(tmp_path / "id" / "tls.crt")
    assert identity.peer == Peer(
        *("lab", role, name_of(role), certificate.serial_number),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )
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
    fresh: Authority, tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "id"
    hosts = ["localhost"]
    ensure_identity(fresh, directory, Role.SITE, "lab-1", hosts)
    key = load_key(directory / "tls.key")
    if reason == "near expiry":
        with monkeypatch.context() as patch:
            patch.setattr("certs.authority.datetime", Yesterday)
            short = fresh.issue(
                key.public_key(), Role.SITE, "lab-1", hosts=hosts, lifetime=timedelta(hours=35)
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


def forgotten(issued: list[Issued], *serials: int) -> list[Issued]:
    """The index, with these certificates expired long ago."""
    past = datetime.now(UTC) - 2 * CLOCK_SKEW
    return [replace(line, not_after=past) if line.serial in serials else line for line in issued]


def test_an_expired_certificate_leaves_the_list_and_then_the_index(fresh: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    first, second = (fresh.issue(key, Role.SITE, "lab-1").serial_number for _ in range(2))
    fresh.revoke(Role.SITE, "lab-1")
    write_index(fresh.directory / "issued.jsonl", forgotten(fresh.issued(), first))
    assert [line.serial for line in fresh.issued()] == [second]
    fresh.renew_crl()
    assert [entry.serial_number for entry in crl_of(fresh)] == [second]
    # A holder's last stays on record, and only there.
    write_index(fresh.directory / "issued.jsonl", forgotten(fresh.issued(), second))
    assert [line.state(datetime.now(UTC)) for line in fresh.issued()] == ["revoked"]
    fresh.renew_crl()
    assert not list(crl_of(fresh))


def test_a_certificate_expired_for_less_than_the_skew_stays_on_the_list(fresh: Authority) -> None:
    """A server whose clock is behind still takes it for valid."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    serial = fresh.issue(key, Role.SITE, "lab-1").serial_number
    fresh.revoke(Role.SITE, "lab-1")
    now = datetime.now(UTC)
    lines = [replace(line, not_after=now - CLOCK_SKEW / 2) for line in fresh.issued()]
    write_index(fresh.directory / "issued.jsonl", lines)
    fresh.renew_crl()
    assert [entry.serial_number for entry in crl_of(fresh)] == [serial]


def test_the_lists_number_grows_though_the_clock_was_set_back(
    fresh: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = number_of(fresh)
    monkeypatch.setattr("certs.authority.datetime", Yesterday)
    fresh.renew_crl()
    assert number_of(fresh) == before + 1


def crl_of(authority: Authority) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(authority.crl.read_bytes())


def number_of(authority: Authority) -> int:
    return crl_of(authority).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_an_interrupted_revocation_is_in_force_with_the_next_list(
    fresh: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    serial = fresh.issue(key, Role.SITE, "lab-1").serial_number
    with monkeypatch.context() as patch:
        patch.setattr(Authority, "_sign_revocations", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.revoke(Role.SITE, "lab-1")
    fresh.renew_crl()
    assert [entry.serial_number for entry in crl_of(fresh)] == [serial]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_at_once_lose_no_line(fresh: Authority) -> None:
    """The enrolment service and 'vlafleet certs' each have an Authority of their own."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    others = [Authority.load(fresh.directory) for _ in range(4)]

    def issue(authority: Authority) -> list[int]:
        return [authority.issue(key, Role.SITE, "lab-1").serial_number for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        serials = [serial for batch in pool.map(issue, others) for serial in batch]
    assert sorted(line.serial for line in fresh.issued()) == sorted(serials)


def test_an_index_of_an_earlier_version_is_refused(fresh: Authority) -> None:
    line = {
        "serial": "1",
        "role": "site",
        "name": "a",
        "not_after": "2030-01-01T00:00:00+00:00",
        "revoked_at": None,
    }
    (fresh.directory / "issued.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(CertificateError, match=r"earlier version of vlafleet .*'authorities'"):
        fresh.issued()


def test_a_key_of_another_authority_signs_nothing(fresh: Authority, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other", "lab")
    (fresh.directory / "ca.key").write_bytes((other.directory / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match=r"no key in .* belongs to the authority"):
        fresh.renew_crl()


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
