"""An identity that cannot be used is refused with a sentence, before anything is started."""

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from certs.authority import Authority
from certs.errors import CertificateError
from certs.files import load_key, pem_certificate
from certs.identity import Identity, ensure_identity
from certs.roles import Role


@pytest.fixture
def site(authority: Authority, tmp_path: Path) -> Path:
    ensure_identity(authority, tmp_path / "id", Role.SITE, "site-x", ["localhost"])
    return tmp_path / "id"


def expire(site: Path, authority: Authority) -> None:
    key = load_key(site / "tls.key").public_key()
    old = authority.issue(key, Role.SITE, "site-x", lifetime=timedelta(seconds=-1))
    (site / "tls.crt").write_bytes(pem_certificate(old))


def other_key(site: Path, authority: Authority) -> None:
    (site / "tls.key").unlink()
    ensure_identity(authority, site.parent / "other", Role.SITE, "site-y")
    shutil.copy(site.parent / "other" / "tls.key", site / "tls.key")


def other_authority(site: Path, authority: Authority) -> None:
    foreign = Authority.init(site.parent / "foreign", "test")
    (site / "ca.crt").write_bytes(pem_certificate(foreign.certificate))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda site, _: (site / "tls.crt").unlink(),
            r"certificate .*tls.crt cannot be read: No such file",
        ),
        (
            lambda site, _: (site / "tls.key").unlink(),
            r"private key .*tls.key cannot be read: No such file",
        ),
        (
            lambda site, _: (site / "ca.crt").unlink(),
            r"authority certificate .*ca.crt cannot be read",
        ),
        (lambda site, _: (site / "tls.crt").write_text("x"), "is not a PEM certificate"),
        (lambda site, _: (site / "tls.key").write_text("x"), "is not an unencrypted PEM key"),
        (lambda site, _: (site / "tls.key").chmod(0o644), "open to every user; run 'chmod 600"),
        (expire, "is valid from .* issue it again or correct the clock"),
        (other_key, "do not belong together"),
        (other_authority, "was not issued by the authority"),
    ],
)
def test_damage_is_named(
    site: Path, authority: Authority, damage: Callable[[Path, Authority], None], sentence: str
) -> None:
    Identity.load(site, Role.SITE)
    damage(site, authority)
    with pytest.raises(CertificateError, match=sentence):
        Identity.load(site, Role.SITE)


def test_another_role_is_refused(site: Path) -> None:
    with pytest.raises(
        CertificateError,
        match="is the identity of site 'site-x'; this command needs one of role op",
    ):
        Identity.load(site, Role.OPERATOR)
