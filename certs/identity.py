"""A process's identity: the directory with its key, its certificate and the authority it trusts.

``tls.key``, ``tls.crt``, ``ca.crt``; the SuperLink's and the exporter's also hold ``crl.pem``, a site's its SuperNode
key pair (``node.key``, ``node.pub``, OpenSSH, the key Flower's SuperNode authentication knows the site by).

A renewal replaces the first three at once. What is new is written to ``renewed.pem`` first, a redo record: from then on
it is what the identity says, and whoever reads it after a crash finishes the replacement.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    parse_certificates,
    parse_key,
    pem_certificate,
    pem_key,
    read,
    read_private,
    sync_directory,
    write_atomic,
)
from certs.lifetime import renew_at
from certs.roles import ENROLMENT_NAME, EXPORTER_NAME, SUPERLINK_NAME, Peer, Role, checked_site

_RECORD = "renewed.pem"
# Who looks up revoked certificates in a file of its own; the enrolment service reads the authority's.
_WITH_LIST = {Role.SUPERLINK: SUPERLINK_NAME, Role.EXPORTER: EXPORTER_NAME}
# Files that do not fit together are read again for so long: somebody may be replacing them one after the other.
_SETTLE_SECONDS = 1.0


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
        """The authority's certificate, PEM; two of them while the authority is being replaced."""
        return self.directory / "ca.crt"

    @property
    def crl(self) -> Path:
        """The signed revocation list, PEM (the SuperLink's and the exporter's identity only)."""
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
        certificate = _settled(directory).check()
        peer = Peer.of(certificate)
        if peer.role not in roles:
            raise CertificateError(
                f"{directory} is the identity of {peer.role} {peer.name!r}; "
                f"this command needs one of role {' or '.join(roles)}"
            )
        now = datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
            raise CertificateError(
                f"the certificate in {directory} is valid from "
                f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; issue it again or correct the clock"
            )
        return cls(directory, peer, certificate.not_valid_after_utc)

    def bundle(self) -> str:
        """Return the certificates of the authorities that are trusted now, PEM."""
        return _read(self.directory).authority.decode()

    def authorities(self) -> list[x509.Certificate]:
        """Return the authorities that are trusted now."""
        return _read(self.directory).authorities()

    def version(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Tell what the files hold now from what they held before, without reading them."""
        return tuple(map(_stat, (self.key, self.certificate, self.authority)))

    @contextlib.contextmanager
    def chain(self) -> Iterator[str]:
        """Lend a file that holds the certificate and its key, for ``SSLContext.load_cert_chain``.

        Two files read one after the other may be of two renewals. This one lies in memory only.
        """
        held = _settled(self.directory)
        with os.fdopen(os.memfd_create("identity"), "wb") as file:
            file.write(held.certificate + held.key)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"


@dataclass(frozen=True)
class IdentityFiles:
    """What the files of an identity say, PEM; ``directory`` is where they were read, for sentences."""

    directory: Path
    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes

    def authorities(self) -> list[x509.Certificate]:
        """Return the authorities that the identity trusts."""
        return parse_certificates(
            self.authority, self.directory / "ca.crt", "authority certificate"
        )

    def check(self) -> x509.Certificate:
        """Return the certificate; raise ``CertificateError`` unless the key is its own and an authority signed it."""
        path = self.directory / "tls.crt"
        certificate = parse_certificates(self.certificate, path, "certificate")[0]
        authorities = self.authorities()
        if certificate.public_key() != parse_key(self.key, self.directory / "tls.key").public_key():
            raise _MismatchError(
                f"{self.directory}: tls.key and tls.crt do not belong together; issue the certificate again"
            )
        if not is_issued_by(certificate, authorities):
            raise _MismatchError(
                f"{self.directory}: tls.crt was not issued by the authority in ca.crt; issue it again"
            )
        return certificate


class _MismatchError(CertificateError):
    """Files that do not fit together."""


def is_issued_by(certificate: x509.Certificate, authorities: Sequence[x509.Certificate]) -> bool:
    """Whether one of the authorities signed the certificate itself."""
    for authority in authorities:
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            certificate.verify_directly_issued_by(authority)
            return True
    return False


def store_identity(
    directory: Path, key: ec.EllipticCurvePrivateKey, certificate_pem: str, authority_pem: str
) -> None:
    """Replace key, certificate and bundle of an identity at once: a crash leaves the old ones or the new ones.

    Whoever reads meanwhile gets the one or the other. Raises ``CertificateError`` when the three do not fit together,
    or cannot be written.
    """
    given = IdentityFiles(directory, pem_key(key), certificate_pem.encode(), authority_pem.encode())
    # Encoded again: nothing but what was checked is stored.
    new = IdentityFiles(
        directory,
        given.key,
        pem_certificate(given.check()),
        b"".join(map(pem_certificate, given.authorities())),
    )
    with _locked(directory):
        # What a killed process left may hold a key.
        for name in (_RECORD, "tls.key"):
            for stray in directory.glob(f".{name}.*"):
                stray.unlink(missing_ok=True)
        write_atomic(directory / _RECORD, new.key + new.certificate + new.authority, private=True)
        _apply(new)


def _apply(new: IdentityFiles) -> None:
    """Put the files of the redo record in place."""
    write_atomic(new.directory / "ca.crt", new.authority)
    write_atomic(new.directory / "tls.key", new.key, private=True)
    write_atomic(new.directory / "tls.crt", new.certificate)
    (new.directory / _RECORD).unlink()
    sync_directory(new.directory)


def _finish(directory: Path, flags: int = 0) -> None:
    """Finish a replacement that was interrupted."""
    with _locked(directory, flags):
        recorded = _recorded(directory)
        if recorded is not None:
            _apply(recorded)


def read_identity(directory: Path, *, private: bool = True) -> IdentityFiles | None:
    """Return what a directory's files say, all of one renewal; None where there is no certificate.

    Raises ``CertificateError`` when they do not belong together; and when every user may read the key, unless
    ``private`` is false: what is mounted has the modes that its mount gives it.
    """
    if not (directory / _RECORD).exists() and not (directory / "tls.crt").exists():
        return None
    return _settled(directory, private=private)


def _recorded(directory: Path) -> IdentityFiles | None:
    """Return what a replacement under way, or an interrupted one, puts in place."""
    path = directory / _RECORD
    try:
        data = read_private(path)
    except CertificateError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    blocks = re.findall(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----\n", data, re.DOTALL)
    if len(blocks) < 3:
        raise CertificateError(f"{path} is damaged; remove it, and issue the identity again")
    return IdentityFiles(directory, blocks[0], blocks[1], b"".join(blocks[2:]))


def _read(directory: Path, *, private: bool = True) -> IdentityFiles:
    recorded = _recorded(directory)
    if recorded is None:
        key = directory / "tls.key"
        return IdentityFiles(
            directory,
            read_private(key) if private else read(key, "private key"),
            read(directory / "tls.crt", "certificate"),
            read(directory / "ca.crt", "authority certificate"),
        )
    # Only the owner's: what root or another user put in place, the owner could not read.
    if directory.stat().st_uid == os.geteuid():
        # A read-only mount, or the one who replaces it is at work.
        with contextlib.suppress(CertificateError, OSError):
            _finish(directory, fcntl.LOCK_NB)
    return recorded


def _settled(directory: Path, *, private: bool = True) -> IdentityFiles:
    """Return files that fit together; raise ``CertificateError`` when they do not even after a while."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        files = _read(directory, private=private)
        try:
            files.check()
        except _MismatchError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_SETTLE_SECONDS / 50)
        else:
            return files


@contextlib.contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[None]:
    """Let one process at a time replace an identity's files; ``flags`` of flock(2)."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CertificateError(
            f"{directory} cannot be written: {error.strerror}; check the directory and its owner"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(lock)


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


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
    if (directory / _RECORD).exists():
        _finish(directory)
    if path.exists():
        certificate = load_certificate(path)
        peer = Peer.of(certificate)
        if (peer.federation, peer.role, peer.name) != (authority.federation, role, name):
            raise CertificateError(
                f"{directory} holds the identity {peer.uri}; choose another directory for {role} {name!r}"
            )
        if _is_good(authority, certificate, hosts):
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
        (Role.EXPORTER, EXPORTER_NAME, [*local, EXPORTER_NAME]),
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
    """Hand the current revocation list to who needs it in the same PKI directory."""
    for role, name in _WITH_LIST.items():
        directory = identity_directory(pki, role, name)
        if directory.exists():
            write_atomic(directory / "crl.pem", read(authority.crl, "revocation list"))


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the DNS names and IP addresses that a certificate is good for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [
        *names.get_values_for_type(x509.DNSName),
        *map(str, names.get_values_for_type(x509.IPAddress)),
    ]


def _is_good(authority: Authority, certificate: x509.Certificate, hosts: Sequence[str]) -> bool:
    return (
        authority.is_current(certificate)
        and datetime.now(UTC) < renew_at(certificate)
        and set(hosts_of(certificate)) >= set(hosts)
    )


def _complete(authority: Authority, directory: Path, role: Role) -> None:
    """Write what goes beside key and certificate."""
    write_atomic(directory / "ca.crt", authority.bundle)
    if role in _WITH_LIST:
        write_atomic(directory / "crl.pem", read(authority.crl, "revocation list"))
    if role is Role.SITE:
        ensure_node_key(directory)


def ensure_node_key(directory: Path) -> None:
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
