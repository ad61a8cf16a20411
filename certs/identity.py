"""A process's identity: the directory with its key, its certificate and the authority it trusts.

``tls.key``, ``tls.crt``, ``ca.crt``; the SuperLink's also holds ``crl.pem``, a site's its SuperNode key pair
(``node.key``, ``node.pub``, OpenSSH, the key Flower's SuperNode authentication knows the site by).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.errors import CertificateError
from certs.files import (
    ensure_key,
    load_certificate,
    load_key,
    pem_certificate,
    read,
    write_atomic,
)
from certs.roles import ENROLMENT_NAME, SUPERLINK_NAME, Peer, Role, checked_site


@dataclass(frozen=True)
class Identity:
    """A key pair with the certificate that says who holds it."""

    directory: Path
    peer: Peer
    not_after: datetime

    @property
    def certificate(self) -> Path:
        """The certificate, PEM."""
        return self.directory / "tls.crt"

    @property
    def key(self) -> Path:
        """The private key, PEM, mode 0600."""
        return self.directory / "tls.key"

    @property
    def authority(self) -> Path:
        """The authority's certificate, PEM."""
        return self.directory / "ca.crt"

    @property
    def crl(self) -> Path:
        """The signed revocation list, PEM (the SuperLink's identity only)."""
        return self.directory / "crl.pem"

    @property
    def node_key(self) -> Path:
        """The SuperNode's private key (a site's identity only)."""
        return self.directory / "node.key"

    @property
    def node_public_key(self) -> Path:
        """The SuperNode's public key, as ``flwr supernode register`` takes it."""
        return self.directory / "node.pub"

    @classmethod
    def load(cls, directory: Path, *roles: Role) -> Self:
        """Open an identity; raise ``CertificateError`` unless it is complete, current and of one of ``roles``."""
        certificate = load_certificate(directory / "tls.crt")
        authority = load_certificate(directory / "ca.crt", "authority certificate")
        key = load_key(directory / "tls.key")
        peer = Peer.of(certificate)
        if peer.role not in roles:
            raise CertificateError(
                f"{directory} is the identity of {peer.role} {peer.name!r}; "
                f"this command needs one of role {' or '.join(roles)}"
            )
        if certificate.public_key() != key.public_key():
            raise CertificateError(
                f"{directory}: tls.key and tls.crt do not belong together; issue the certificate again"
            )
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise CertificateError(
                f"{directory}: tls.crt was not issued by the authority in ca.crt; issue it again"
            ) from error
        now = datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            raise CertificateError(
                f"the certificate in {directory} is valid from "
                f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; issue it again or correct the clock"
            )
        return cls(directory, peer, certificate.not_valid_after_utc)


def authority_directory(pki: Path) -> Path:
    """Where the authority of a PKI directory lies; nothing but the certs commands reads it."""
    return pki / "ca"


def identity_directory(pki: Path, role: Role, name: str) -> Path:
    """Where a PKI directory keeps the identity of a holder."""
    return pki / role / name


def ensure_identity(
    authority: Authority, directory: Path, role: Role, name: str, hosts: Sequence[str] = ()
) -> Literal["issued", "kept"]:
    """Issue an identity into ``directory`` unless a good one is there; never replace a key.

    A certificate that has less than a third of its life left, is revoked, or lacks one of ``hosts`` is issued again
    for the same key. An identity of somebody else is an error.
    """
    path = directory / "tls.crt"
    if path.exists():
        certificate = load_certificate(path)
        peer = Peer.of(certificate)
        if (peer.federation, peer.role, peer.name) != (authority.federation, role, name):
            raise CertificateError(
                f"{directory} holds the identity {peer.uri}; choose another directory for {role} {name!r}"
            )
        if _is_good(authority, certificate, peer, hosts):
            _complete(authority, directory, role)
            return "kept"
    key = ensure_key(directory / "tls.key")
    certificate = authority.issue(key.public_key(), role, name, hosts=hosts)
    _complete(authority, directory, role)
    # Last: a directory with a certificate is complete.
    write_atomic(path, pem_certificate(certificate))
    return "issued"


def ensure_federation(
    pki: Path, federation: str, sites: Sequence[str], hosts: Sequence[str] = ()
) -> Iterator[tuple[Literal["issued", "kept"], Path]]:
    """Ensure the authority and every identity of a federation on one machine; yield each outcome.

    Its servers answer at localhost, at ``hosts`` and, for containers, at their own names.
    """
    for site in sites:
        checked_site(site)
    authority = Authority.init(authority_directory(pki), federation)
    # A federation whose members never change would otherwise let its list go stale.
    authority.renew_crl()
    local = ["localhost", "127.0.0.1", *hosts]
    holders: list[tuple[Role, str, list[str]]] = [
        (Role.SUPERLINK, SUPERLINK_NAME, [*local, SUPERLINK_NAME]),
        (Role.ENROLMENT, ENROLMENT_NAME, [*local, ENROLMENT_NAME]),
        (Role.SUPEREXEC, SUPERLINK_NAME, []),
        (Role.OPERATOR, "admin", []),
        (Role.MONITOR, "prometheus", []),
    ]
    for site in sites:
        holders += [(Role.SITE, site, [*local, site]), (Role.SUPEREXEC, site, [])]
    for role, name, names in holders:
        directory = identity_directory(pki, role, name)
        yield ensure_identity(authority, directory, role, name, names), directory


def publish_crl(pki: Path, authority: Authority) -> None:
    """Hand the current revocation list to the SuperLink's identity in the same PKI directory."""
    directory = identity_directory(pki, Role.SUPERLINK, SUPERLINK_NAME)
    if directory.exists():
        write_atomic(directory / "crl.pem", read(authority.crl, "revocation list"))


def _is_good(
    authority: Authority, certificate: x509.Certificate, peer: Peer, hosts: Sequence[str]
) -> bool:
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    revoked = {line.serial for line in authority.issued() if line.revoked_at is not None}
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    held = {
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    }
    return (
        certificate.issuer == authority.certificate.subject
        and certificate.not_valid_after_utc - datetime.now(UTC) > lifetime / 3
        and peer.serial not in revoked
        and held >= set(hosts)
    )


def _complete(authority: Authority, directory: Path, role: Role) -> None:
    """Write what goes beside key and certificate."""
    write_atomic(directory / "ca.crt", authority.bundle)
    if role is Role.SUPERLINK:
        write_atomic(directory / "crl.pem", read(authority.crl, "revocation list"))
    if role is Role.SITE:
        _ensure_node_key(directory)


def _ensure_node_key(directory: Path) -> None:
    """Make the SuperNode's key pair once: a key that Flower unregistered can never be registered again."""
    if (directory / "node.key").exists():
        return
    # Flower reads an OpenSSH key on a NIST curve (flwr.supernode.cli.flower_supernode).
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    # The private key last: where it is, its public half is.
    write_atomic(directory / "node.pub", public + b"\n")
    write_atomic(directory / "node.key", private, private=True)
