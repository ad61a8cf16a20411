"""How long certificates live, and when their holders renew them."""

from datetime import datetime, timedelta

from cryptography import x509

from certs.roles import Peer, Role

AUTHORITY_LIFETIME = timedelta(days=3650)
# A site is the least guarded machine, so its certificate (and that of the SuperExec beside it) lives shortest. The
# others stand on the operator's own machines, where a month keeps renewal practised but not a daily chore.
LIFETIMES = {
    Role.SITE: timedelta(days=7),
    Role.SUPEREXEC: timedelta(days=7),
    Role.SUPERLINK: timedelta(days=30),
    Role.ENROLMENT: timedelta(days=30),
    Role.OPERATOR: timedelta(days=30),
    Role.MONITOR: timedelta(days=30),
    Role.EXPORTER: timedelta(days=30),
}
# Machines whose clock runs behind must accept a certificate made this moment.
CLOCK_SKEW = timedelta(minutes=5)


def issued_at(certificate: x509.Certificate) -> datetime:
    """When it was signed: its validity begins ``CLOCK_SKEW`` earlier."""
    return certificate.not_valid_before_utc + CLOCK_SKEW


def life(certificate: x509.Certificate) -> timedelta:
    """How long it was to live from the moment it was signed."""
    return certificate.not_valid_after_utc - issued_at(certificate)


def life_of(peer: Peer) -> timedelta:
    """The same of the certificate that a verified peer presented."""
    return peer.not_after - peer.not_before - CLOCK_SKEW


def renew_at(certificate: x509.Certificate) -> datetime:
    """When its holder renews it: at two thirds of its life."""
    return certificate.not_valid_after_utc - life(certificate) / 3
