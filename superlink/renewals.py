"""Renewal: a holder of a certificate gets the next one, for a new key, before it expires."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from certs.authority import Authority
from certs.enrolment import requested_key
from certs.errors import CertificateError
from certs.files import pem_certificate
from certs.identity import hosts_of
from certs.lifetime import LIFETIMES
from certs.roles import Peer, Role
from superlink.refused import Refused


def renew(
    directory: Path, peer: Peer, presented: x509.Certificate, record: Any, site_lifetime: timedelta
) -> dict[str, str]:
    """Sign a certificate for the holder of ``presented``, or for a site's SuperExec; return it with whom to trust.

    ``directory`` is the authority's. Raises ``Refused``.
    """
    if not isinstance(record, Mapping) or not {"csr"} <= set(record) <= {"csr", "role"}:
        raise Refused("malformed", "a renewal has a csr, and a role where it is for another")
    role, csr = record.get("role", peer.role), record["csr"]
    if not isinstance(csr, str) or not isinstance(role, str):
        raise Refused("malformed", "a renewal's csr and role are strings")
    if role != peer.role and (role, peer.role) != (Role.SUPEREXEC, Role.SITE):
        raise Refused(
            "role", f"{peer.role} {peer.name!r} may not ask for a certificate of {role!r}"
        )
    try:
        key = requested_key(csr)
    except CertificateError as error:
        raise Refused("proof", str(error)) from error
    if key == presented.public_key():
        raise Refused("proof", "a renewal is for a new key: make one")
    wanted = Role(role)
    authority = Authority.load(directory)
    _require_valid(authority, peer)
    short_lived = wanted in {Role.SITE, Role.SUPEREXEC}
    certificate = authority.issue(
        key,
        wanted,
        peer.name,
        hosts=hosts_of(presented) if wanted is peer.role else [],
        lifetime=site_lifetime if short_lived else LIFETIMES[wanted],
    )
    # Revoked while this was signed? What was signed after the revocation would have outlived it.
    try:
        _require_valid(authority, peer)
    except Refused:
        authority.revoke(wanted, peer.name)
        raise
    return {
        "certificate": pem_certificate(certificate).decode(),
        "authority": authority.bundle.decode(),
    }


def _require_valid(authority: Authority, peer: Peer) -> None:
    for line in authority.issued():
        if line.serial == peer.serial and line.revoked_at is not None:
            raise Refused(
                "revoked",
                f"the certificate of {peer.role} {peer.name!r} was revoked: ask the operator for an invitation",
            )
