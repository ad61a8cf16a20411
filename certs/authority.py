"""The federation's certificate authority: issue, revoke, list.

One private authority per federation, EC P-256. Its directory holds the key (mode 0600), the certificate, the signed
revocation list and an index of what was issued; nothing but ``vlafleet certs`` and ``vlafleet enrolment`` reads the
key. Both may work on the directory at the same time: every step holds its lock and reads it anew.

``ca.crt`` is a bundle: the certificate that signs comes first, and while the authority is being replaced
(``certs/rotation.py``) the other one that holders trust comes second. The key that signs is the one of the first.
"""

import contextlib
import fcntl
import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.errors import CertificateError
from certs.files import (
    ensure_key,
    load_certificate,
    load_certificates,
    load_key,
    pem_certificate,
    read,
    write_atomic,
)
from certs.index import Issued, read_index, write_index
from certs.lifetime import AUTHORITY_LIFETIME, CLOCK_SKEW, LIFETIMES
from certs.roles import (
    ENROLMENT_NAME,
    EXPORTER_NAME,
    SUPERLINK_NAME,
    Role,
    checked_name,
    checked_site,
    spiffe_id,
    subject,
)

# The SuperNode also serves its SuperExec (Runtime API), hence a server certificate. Clients check the server's role,
# so a site cannot pose as the SuperLink with it. The SuperLink's own health probe is a client.
SERVERS = frozenset({Role.SUPERLINK, Role.ENROLMENT, Role.SITE, Role.EXPORTER})
# A federation has one of each.
ONLY_NAMES = {
    Role.SUPERLINK: SUPERLINK_NAME,
    Role.ENROLMENT: ENROLMENT_NAME,
    Role.EXPORTER: EXPORTER_NAME,
}
# A list older than this is reported as stale; it is signed anew at every revocation and every 'certs' command.
CRL_LIFETIME = timedelta(days=30)


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, federation: str) -> None:
        self.directory = directory
        self.federation = federation

    @classmethod
    def init(cls, directory: Path, federation: str) -> Self:
        """Make an authority, or return the one that is there when it is this federation's."""
        checked_name(federation, "federation name")
        if (directory / "ca.crt").exists():
            authority = cls.load(directory)
            if authority.federation != federation:
                raise CertificateError(
                    f"{directory} holds the authority of {authority.federation!r}, not of "
                    f"{federation!r}; choose another directory"
                )
            return authority
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise CertificateError(f"{directory} cannot be made: {error.strerror}") from error
        authority = cls(directory, federation)
        with authority.locked():
            if not (directory / "ca.crt").exists():
                # An interrupted first attempt left at most a key, which nothing was signed with: it is used.
                key = ensure_key(directory / "ca.key")
                certificate = self_signed(key, federation, 1)
                authority._sign_revocations(certificate, key, [])
                write_atomic(directory / "ca.crt", pem_certificate(certificate))
        return authority

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open the authority in a directory."""
        certificate = load_certificate(directory / "ca.crt", "authority certificate")
        organizations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if len(organizations) != 1:
            raise CertificateError(f"{directory / 'ca.crt'} is not a federation's authority")
        generation(certificate)
        return cls(directory, str(organizations[0].value))

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate of the key that signs now."""
        return load_certificate(self.directory / "ca.crt", "authority certificate")

    @property
    def bundle(self) -> bytes:
        """The certificates that every holder trusts, PEM; the one that signs is the first.

        Read it after ``issue``, not before: the index says that a holder got all that were trusted then.
        """
        return read(self.directory / "ca.crt", "authority certificate")

    def certificates(self) -> list[x509.Certificate]:
        """Return the certificates of the bundle in order."""
        return load_certificates(self.directory / "ca.crt", "authority certificate")

    def signer(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """Return the certificate and the key that sign; to be called with the directory locked."""
        certificate = self.certificate
        for name in ("ca.key", "next.key"):
            path = self.directory / name
            if path.exists() or name == "ca.key":
                key = load_key(path)
                if key.public_key() == certificate.public_key():
                    return certificate, key
        raise CertificateError(
            f"no key in {self.directory} belongs to the authority in its ca.crt; "
            "restore both from one backup"
        )

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        role: Role,
        name: str,
        *,
        hosts: Sequence[str] = (),
        lifetime: timedelta | None = None,
    ) -> x509.Certificate:
        """Sign a certificate for a public key.

        ``hosts`` are DNS names and IP addresses a server answers at; roles that serve nothing must have none.
        """
        checked_site(name) if role is Role.SITE else checked_name(name)
        if role in ONLY_NAMES and name != ONLY_NAMES[role]:
            raise CertificateError(f"the only {role} is named {ONLY_NAMES[role]!r}, not {name!r}")
        if hosts and role not in SERVERS:
            raise CertificateError(
                f"a certificate of role {role} serves nothing; leave out the hosts"
            )
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(spiffe_id(self.federation, role, name)),
            *(_host(host) for host in hosts),
        ]
        with self.locked():
            return self._issue(
                public_key, role, name, names, LIFETIMES[role] if lifetime is None else lifetime
            )

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        role: Role,
        name: str,
        names: Sequence[x509.GeneralName],
        lifetime: timedelta,
    ) -> x509.Certificate:
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role in SERVERS:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        authority, key = self.signer()
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject(self.federation, role, name))
            .issuer_name(authority.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        line = Issued(
            certificate.serial_number,
            role,
            name,
            certificate.not_valid_after_utc,
            tuple(map(generation, self.certificates())),
            issued_at=now,
        )
        write_index(self._index, [*self.issued(), line])
        return certificate

    def is_current(self, certificate: x509.Certificate) -> bool:
        """Whether the key that signs now signed it, its holder got the whole bundle with it, and it is not revoked."""
        trusted = [generation(authority) for authority in self.certificates()]
        return any(
            line.serial == certificate.serial_number
            and line.revoked_at is None
            and line.authorities[0] == trusted[0]
            and {*trusted} <= {*line.authorities}
            for line in self.issued()
        )

    def revoke(self, role: Role, name: str) -> list[Issued]:
        """Revoke every certificate of a holder and sign the list anew; return those newly revoked."""
        with self.locked():
            issued = self.issued()
            if not any((line.role, line.name) == (role, name) for line in issued):
                raise CertificateError(
                    f"no certificate was issued to {role} {name!r} by {self.directory}; "
                    "'vlafleet certs list' shows what was"
                )
            now = datetime.now(UTC)
            revoked = [
                replace(line, revoked_at=now)
                for line in issued
                if (line.role, line.name) == (role, name) and line.state(now) == "valid"
            ]
            by_serial = {line.serial: line for line in revoked}
            issued = [by_serial.get(line.serial, line) for line in issued]
            # The index first: whoever signs the list next, after a crash between the two, has it complete.
            write_index(self._index, issued)
            self._sign_revocations(*self.signer(), issued)
        return revoked

    def issued(self) -> list[Issued]:
        """Return the index in order of issue: all that is valid, and of each holder the last."""
        return read_index(self._index)

    @property
    def _index(self) -> Path:
        return self.directory / "issued.jsonl"

    @property
    def crl(self) -> Path:
        """Where the signed revocation list lies."""
        return self.directory / "crl.pem"

    def renew_crl(self) -> None:
        """Sign the revocation list anew, so that it is never stale on a federation that revokes nobody."""
        with self.locked():
            self.sign_revocations()

    def sign_revocations(self) -> None:
        """Sign the revocation list with the key that signs now; to be called with the directory locked."""
        self._sign_revocations(*self.signer(), self.issued())

    def _sign_revocations(
        self,
        authority: x509.Certificate,
        key: ec.EllipticCurvePrivateKey,
        issued: Sequence[Issued],
    ) -> None:
        now = datetime.now(UTC)
        # Tells the newer of two lists (RFC 5280, 5.2.3): grows even where the clock was set back.
        number = max(int(now.timestamp() * 1_000_000), self._crl_number() + 1)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.subject)
            .last_update(now)
            .next_update(now + CRL_LIFETIME)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for line in issued:
            if line.revoked_at is not None and not line.forgotten(now):
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(line.serial)
                    .revocation_date(line.revoked_at)
                    .build()
                )
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        write_atomic(self.crl, pem)

    def _crl_number(self) -> int:
        """Return the number of the list that is there, 0 without one."""
        try:
            crl = x509.load_pem_x509_crl(self.crl.read_bytes())
            return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (OSError, ValueError, x509.ExtensionNotFound):
            return 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process or thread at a time change the directory."""
        path = self.directory / ".lock"
        try:
            file = path.open("w")
        except OSError as error:
            raise CertificateError(
                f"{path} cannot be written: {error.strerror}; check the directory and its owner"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def self_signed(key: ec.EllipticCurvePrivateKey, federation: str, number: int) -> x509.Certificate:
    """Return the certificate of a federation's authority; ``number`` is its generation, from 1."""
    now = datetime.now(UTC)
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} authority {number}"),
        ]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def generation(certificate: x509.Certificate) -> int:
    """Return which of its federation's authorities a certificate is, from 1; ``CertificateError`` if of none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    match = (
        re.fullmatch(r"[a-z0-9-]+ authority ([1-9][0-9]*)", str(names[0].value)) if names else None
    )
    if match is None:
        raise CertificateError(
            f"{certificate.subject.rfc4514_string()!r} is no authority of this version of vlafleet; "
            "make the federation anew in another directory"
        )
    return int(match[1])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise CertificateError(f"{host!r} is neither a DNS name nor an IP address") from error


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
