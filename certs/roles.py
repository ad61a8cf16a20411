"""Who a certificate speaks for: a role and a name within one federation.

A leaf carries both twice, as subject (O = federation, OU = role, CN = name) for people and tools that only read
subjects, and as the SAN URI ``spiffe://<federation>/<role>/<name>`` (SPIFFE ID, https://spiffe.io) for the checks here.
"""

import re
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Self

from cryptography import x509
from cryptography.x509.oid import NameOID

from certs.errors import CertificateError

# A DNS label (RFC 1123): such a name is also safe as a directory, a container and a metric label.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Role(StrEnum):
    """What a certificate's holder may do."""

    SUPERLINK = "superlink"
    ENROLMENT = "enrolment"
    SITE = "site"
    OPERATOR = "operator"
    SUPEREXEC = "superexec"
    MONITOR = "monitor"
    EXPORTER = "exporter"


# The one SuperLink of a federation, and the SuperExec that runs its ServerApp, go by this name.
SUPERLINK_NAME = "superlink"
# The one process that holds the authority's key and answers those who have no certificate yet.
ENROLMENT_NAME = "enrolment"
# The one process that reads the runs and tells Prometheus, and operators, how they go.
EXPORTER_NAME = "exporter"


def checked_name(name: str, what: str = "name") -> str:
    """Return ``name`` when it is a DNS label; raise ``CertificateError`` that quotes it otherwise."""
    if not _LABEL.fullmatch(name):
        raise CertificateError(
            f"{what} {name!r} is not allowed: use 1 to 63 lower-case letters, digits and dashes, "
            "beginning and ending with a letter or digit"
        )
    return name


def checked_site(name: str) -> str:
    """Return ``name`` when a site may bear it; raise ``CertificateError`` that quotes it otherwise."""
    checked_name(name, "site name")
    if name == SUPERLINK_NAME:
        # Its SuperExec would bear the name of the one that may run ServerApps.
        raise CertificateError(f"a site cannot be named {name!r}; choose another name")
    return name


@dataclass(frozen=True)
class Peer:
    """The verified holder of a certificate."""

    federation: str
    role: Role
    name: str
    serial: int
    _: KW_ONLY
    not_before: datetime
    not_after: datetime

    @property
    def uri(self) -> str:
        """The SPIFFE ID."""
        return spiffe_id(self.federation, self.role, self.name)

    @classmethod
    def of(cls, certificate: x509.Certificate) -> Self:
        """Read the holder of a certificate; raise ``CertificateError`` unless URI and subject agree."""
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
            uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        except (x509.ExtensionNotFound, ValueError):
            uris = []
        if len(uris) != 1:
            raise CertificateError(
                f"a federation certificate has one SAN URI; this has {len(uris)}"
            )
        match = re.fullmatch(r"spiffe://([^/]+)/([^/]+)/([^/]+)", uris[0])
        if match is None or match[2] not in set(Role):
            raise CertificateError(f"{uris[0]!r} does not name a role of a federation")
        peer = cls(
            *(match[1], Role(match[2]), match[3], certificate.serial_number),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )
        if certificate.subject != subject(peer.federation, peer.role, peer.name):
            raise CertificateError(f"the subject and {uris[0]!r} name different holders")
        return peer

    @classmethod
    def of_der(cls, der: bytes) -> Self:
        """Read the holder of a DER-encoded certificate."""
        return cls.of(x509.load_der_x509_certificate(der))


def spiffe_id(federation: str, role: Role, name: str) -> str:
    """Return the SPIFFE ID of a holder."""
    return f"spiffe://{federation}/{role}/{name}"


def subject(federation: str, role: Role, name: str) -> x509.Name:
    """Return the subject of a holder's certificate."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
