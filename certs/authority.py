"""The federation's certificate authority: issue, revoke, list.

One private authority per federation, EC P-256. Its directory holds the key (mode 0600), the certificate, the signed
revocation list and an index of what was issued; nothing but ``vlafleet certs`` reads the key.
"""

import contextlib
import fcntl
import ipaddress
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
    load_key,
    pem_certificate,
    read,
    write_atomic,
)
from certs.lifetime import AUTHORITY_LIFETIME, CLOCK_SKEW, LIFETIMES
from certs.roles import (
    ENROLMENT_NAME,
    SUPERLINK_NAME,
    Role,
    checked_name,
    checked_site,
    spiffe_id,
    subject,
)

# The SuperNode also serves its SuperExec (Runtime API), hence a server certificate. Clients check the server's role,
# so a site cannot pose as the SuperLink with it. The SuperLink's own health probe is a client.
SERVERS = frozenset({Role.SUPERLINK, Role.ENROLMENT, Role.SITE})
# A federation has one of each.
ONLY_NAMES = {Role.SUPERLINK: SUPERLINK_NAME, Role.ENROLMENT: ENROLMENT_NAME}
# A list older than this is reported as stale; it is signed anew at every revocation and every 'certs' command.
CRL_LIFETIME = timedelta(days=30)


@dataclass(frozen=True)
class Issued:
    """One line of the index."""

    serial: int
    role: Role
    name: str
    not_after: datetime
    revoked_at: datetime | None = None

    def state(self, now: datetime) -> str:
        """``valid``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.not_after <= now else "valid"

    def to_json(self) -> dict[str, object]:
        """Return the line as JSON values (the serial in hex, as OpenSSL prints it)."""
        return {
            **asdict(self),
            "serial": f"{self.serial:x}",
            "not_after": self.not_after.isoformat(),
            "revoked_at": self.revoked_at and self.revoked_at.isoformat(),
        }

    @classmethod
    def from_json(cls, record: dict[str, str]) -> Self:
        """Read a line written by ``to_json``."""
        revoked = record["revoked_at"]
        return cls(
            int(record["serial"], 16),
            Role(record["role"]),
            record["name"],
            datetime.fromisoformat(record["not_after"]),
            datetime.fromisoformat(revoked) if revoked else None,
        )


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, certificate: x509.Certificate, federation: str) -> None:
        self.directory = directory
        self.certificate = certificate
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
        # An interrupted first attempt left at most a key, which nothing was signed with: it is used.
        key = ensure_key(directory / "ca.key")
        now = datetime.now(UTC)
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} authority"),
            ]
        )
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
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
        authority = cls(directory, certificate, federation)
        authority._sign_revocations(key, [])
        write_atomic(directory / "ca.crt", pem_certificate(certificate))
        return authority

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Open the authority in a directory."""
        certificate = load_certificate(directory / "ca.crt", "authority certificate")
        organizations = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        if len(organizations) != 1:
            raise CertificateError(f"{directory / 'ca.crt'} is not a federation's authority")
        return cls(directory, certificate, str(organizations[0].value))

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
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role in SERVERS:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        key = load_key(self.directory / "ca.key")
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject(self.federation, role, name))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + (LIFETIMES[role] if lifetime is None else lifetime))
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
        with self._locked():
            issued = self.issued()
            line = Issued(certificate.serial_number, role, name, certificate.not_valid_after_utc)
            self._write_index([*issued, line])
        return certificate

    def revoke(self, role: Role, name: str) -> list[Issued]:
        """Revoke every certificate of a holder and sign the list anew; return those newly revoked."""
        with self._locked():
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
            # The list first: should the index fail to be written, the holder is out all the same.
            self._sign_revocations(load_key(self.directory / "ca.key"), issued)
            self._write_index(issued)
        return revoked

    def issued(self) -> list[Issued]:
        """Return the index in order of issue."""
        path = self.directory / "issued.jsonl"
        if not path.exists():
            return []
        try:
            lines = read(path, "index of certificates").decode().splitlines()
            return [Issued.from_json(json.loads(line)) for line in lines]
        except (ValueError, KeyError) as error:
            raise CertificateError(f"the index {path} is damaged: {error}") from error

    @property
    def bundle(self) -> bytes:
        """The certificates that every holder trusts, PEM: more than one while the authority is being replaced."""
        return read(self.directory / "ca.crt", "authority certificate")

    @property
    def crl(self) -> Path:
        """Where the signed revocation list lies."""
        return self.directory / "crl.pem"

    def renew_crl(self) -> None:
        """Sign the revocation list anew, so that it is never stale on a federation that revokes nobody."""
        with self._locked():
            self._sign_revocations(load_key(self.directory / "ca.key"), self.issued())

    def _sign_revocations(self, key: ec.EllipticCurvePrivateKey, issued: Sequence[Issued]) -> None:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(now + CRL_LIFETIME)
            # Tells the newer of two lists (RFC 5280, 5.2.3); dates alone have whole seconds.
            .add_extension(x509.CRLNumber(int(now.timestamp() * 1_000_000)), critical=False)
        )
        for line in issued:
            if line.revoked_at is not None:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(line.serial)
                    .revocation_date(line.revoked_at)
                    .build()
                )
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        write_atomic(self.crl, pem)

    def _write_index(self, issued: Sequence[Issued]) -> None:
        text = "".join(json.dumps(line.to_json()) + "\n" for line in issued)
        write_atomic(self.directory / "issued.jsonl", text.encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep a second 'vlafleet certs' from overwriting the index in between."""
        with (self.directory / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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
