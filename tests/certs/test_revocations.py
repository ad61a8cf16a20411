"""The revocation list is followed live, and only forwards."""

import logging
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certs import revocations
from certs.authority import Authority
from certs.errors import CertificateError
from certs.revocations import Revocations
from certs.roles import Role


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setattr(revocations, "_CHECK_SECONDS", 0.0)
    return Authority.init(tmp_path / "ca", "lab")


def issue(authority: Authority, name: str) -> int:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return authority.issue(key, Role.SITE, name).serial_number


def test_a_new_list_is_followed(fresh: Authority) -> None:
    followed = Revocations(fresh.crl, fresh.directory / "ca.crt")
    one, two = issue(fresh, "one"), issue(fresh, "two")
    assert one not in followed
    fresh.revoke(Role.SITE, "one")
    assert one in followed
    assert two not in followed


@pytest.mark.parametrize("damage", ["missing", "garbled", "foreign", "older"])
def test_the_last_good_list_stays_in_force(
    fresh: Authority, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    empty = fresh.crl.read_bytes()
    serial = issue(fresh, "one")
    fresh.revoke(Role.SITE, "one")
    followed = Revocations(fresh.crl, fresh.directory / "ca.crt")
    assert serial in followed
    foreign = Authority.init(tmp_path / "foreign", "lab")
    replacement = {"garbled": b"x", "foreign": foreign.crl.read_bytes(), "older": empty}
    new = fresh.crl.with_name("new")
    if damage == "missing":
        fresh.crl.unlink()
    else:
        new.write_bytes(replacement[damage])
        os.replace(new, fresh.crl)
    with caplog.at_level(logging.ERROR):
        assert serial in followed
    assert caplog.records, "the operator must be told"


@pytest.mark.parametrize("damage", ["missing", "garbled", "foreign"])
def test_no_good_list_no_server(fresh: Authority, tmp_path: Path, damage: str) -> None:
    foreign = Authority.init(tmp_path / "foreign", "lab")
    if damage == "missing":
        fresh.crl.unlink()
    else:
        fresh.crl.write_bytes(b"x" if damage == "garbled" else foreign.crl.read_bytes())
    with pytest.raises(CertificateError):
        Revocations(fresh.crl, fresh.directory / "ca.crt")
