"""Who a certificate speaks for, and until when."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.errors import CertificateError
from certs.lifetime import CLOCK_SKEW, LIFETIMES
from certs.roles import Peer, Role, checked_name, checked_site


def test_a_peer_has_the_dates_of_its_certificate(tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "ca", "lab")
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    certificate = authority.issue(key, Role.SITE, "one")
    peer = Peer.of(certificate)
    assert peer.uri == "spiffe://lab/site/one"
    assert peer.serial == certificate.serial_number
    assert peer.not_after - peer.not_before == LIFETIMES[Role.SITE] + CLOCK_SKEW
    assert peer.not_after == certificate.not_valid_after_utc
    assert peer.not_before.utcoffset() == timedelta(0)


def test_an_authority_is_no_peer(tmp_path: Path) -> None:
    authority = Authority.init(tmp_path / "ca", "lab")
    with pytest.raises(CertificateError, match="has one SAN URI; this has 0"):
        Peer.of(authority.certificate)


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a.b", "a/b", "a" * 64, "a\n", "é"])
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(CertificateError, match="is not allowed"):
        checked_name(name)


@pytest.mark.parametrize("name", ["a", "0", "site-1", "a" * 63])
def test_names_that_are(name: str) -> None:
    assert checked_site(name) == name


def test_no_site_is_named_as_the_superlink() -> None:
    with pytest.raises(CertificateError, match="cannot be named 'superlink'"):
        checked_site("superlink")
