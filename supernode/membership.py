"""A site's keys, made where they are used, and the membership that the federation answers them with.

A membership on disk (``membership.json``: certificates, no secret) is the step that cannot be lost: once it is there,
the identities can be written again however often writing them was interrupted.
"""

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from certs.enrolment import Application, Membership, certificate_fingerprint
from certs.errors import CertificateError, FleetError
from certs.files import ensure_key, read, write_atomic
from certs.identity import Identity, ensure_node_key, is_issued_by, store_identity
from certs.invitation import is_address
from certs.roles import Peer, Role
from supernode.site import Site


@dataclass(frozen=True)
class Keys:
    """The private keys of a site: the SuperNode's and the SuperExec's for TLS, and the SuperNode key."""

    site: ec.EllipticCurvePrivateKey
    superexec: ec.EllipticCurvePrivateKey
    node: ec.EllipticCurvePrivateKey

    @classmethod
    def ensure(cls, site: Site) -> "Keys":
        """Return the keys in a site's directory, making (mode 0600) those that are not there."""
        site.prepare()
        ensure_node_key(site.identity)
        path = site.identity / "node.key"
        try:
            node = load_ssh_private_key(read(path, "SuperNode key"), password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateError(f"{path} is not an unencrypted OpenSSH key") from error
        if not isinstance(node, ec.EllipticCurvePrivateKey):
            raise CertificateError(f"{path} is not an elliptic-curve key")
        return cls(
            ensure_key(site.identity / "tls.key"), ensure_key(site.superexec / "tls.key"), node
        )

    def application(self, site: Site) -> Application:
        """Apply with these keys."""
        return Application.make(site.federation, site.name, self.site, self.superexec, self.node)


def discard(site: Site) -> None:
    """Remove keys and certificates that the federation does not take again."""
    for directory in (site.identity, site.superexec):
        # The newest certificate first: a directory with one is complete.
        for name in ("renewed.pem", "tls.crt", "ca.crt", "tls.key", "node.key", "node.pub"):
            (directory / name).unlink(missing_ok=True)


def identities(site: Site) -> tuple[Identity, Identity] | None:
    """Return the identities of SuperNode and SuperExec; None unless both are complete, current and this site's."""
    try:
        pair = (
            Identity.load(site.identity, Role.SITE),
            Identity.load(site.superexec, Role.SUPEREXEC),
        )
    except FleetError:
        return None
    for identity in pair:
        if (identity.peer.federation, identity.peer.name) != (site.federation, site.name):
            return None
    return pair if pair[0].node_key.exists() else None


def check(membership: Membership, site: Site, keys: Keys, fingerprint: str) -> None:
    """Raise ``CertificateError`` unless a membership is this site's, for these keys, of the authority named.

    ``fingerprint`` is the SHA-256 (hex) of the authority's certificate.
    """
    if (membership.federation, membership.site) != (site.federation, site.name):
        raise CertificateError(
            f"the membership is of the site {membership.site!r} of {membership.federation!r}, "
            f"not of {site.name!r} of {site.federation!r}"
        )
    for address in (membership.superlink, membership.enrolment):
        if not is_address(address):
            raise CertificateError(f"the membership's address {address!r} is not host:port")
    try:
        authorities = x509.load_pem_x509_certificates(membership.authority.encode())
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError("the membership's authority is not a PEM certificate") from error
    if fingerprint not in map(certificate_fingerprint, authorities):
        raise CertificateError(
            f"the membership is of another authority than the one with the fingerprint {fingerprint}: "
            "compare it with the federation's operator; nothing was stored"
        )
    for pem, key, role in (
        (membership.certificate, keys.site, Role.SITE),
        (membership.superexec_certificate, keys.superexec, Role.SUPEREXEC),
    ):
        _check_certificate(pem, key, role, site, authorities)


def _check_certificate(
    pem: str,
    key: ec.EllipticCurvePrivateKey,
    role: Role,
    site: Site,
    authorities: list[x509.Certificate],
) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
    except (ValueError, x509.InvalidVersion) as error:
        raise CertificateError(f"the membership's certificate for {role} is not PEM") from error
    peer = Peer.of(certificate)
    if (peer.federation, peer.role, peer.name) != (site.federation, role, site.name):
        raise CertificateError(
            f"the membership's certificate speaks for {peer.uri}, not for {role} {site.name!r} "
            f"of {site.federation!r}"
        )
    if certificate.public_key() != key.public_key():
        raise CertificateError(
            f"the membership's certificate for {role} is for another key than this directory's: "
            "it answers another application"
        )
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise CertificateError(
            f"the membership's certificate for {role} was over on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d at %H:%M} UTC: ask the federation's operator for another one"
        )
    if not is_issued_by(certificate, authorities):
        raise CertificateError(
            f"the membership's certificate for {role} is not signed by its authority"
        )


def keep(membership: Membership, site: Site) -> None:
    """Write a checked membership down, before anything is made of it."""
    data = json.dumps(membership.to_json(), indent=2).encode() + b"\n"
    write_atomic(_path(site), data, private=True)


def kept(site: Site) -> Membership | None:
    """Return the membership that an interrupted command left, if one did."""
    with contextlib.suppress(CertificateError):
        return read_membership(_path(site))
    return None


def read_membership(path: Path) -> Membership:
    """Read a membership's file; raise ``CertificateError`` when it holds none."""
    try:
        return Membership.from_json(json.loads(read(path, "membership")))
    except ValueError as error:
        raise CertificateError(f"{path} is not a membership: it is not JSON") from error


def store(membership: Membership, site: Site, keys: Keys) -> None:
    """Make identities of a kept membership; then it is not needed any more."""
    for directory, key, certificate in (
        (site.superexec, keys.superexec, membership.superexec_certificate),
        (site.identity, keys.site, membership.certificate),
    ):
        store_identity(directory, key, certificate, membership.authority)


def forget(site: Site) -> None:
    """Remove a kept membership whose identities and ``site.json`` are written."""
    _path(site).unlink(missing_ok=True)


def _path(site: Site) -> Path:
    return site.directory / "membership.json"
