"""The revoked serials, read live from the authority's signed list."""

import logging
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from certs.errors import CertificateError
from certs.files import load_certificates, read, write_atomic

_log = logging.getLogger("vlafleet.certs")

# How often the list's file is looked at: an evicted site is out within this time, and a stat a second costs nothing.
_CHECK_SECONDS = 1.0


class Revocations:
    """A revocation list (RFC 5280) that follows its file, or is handed over with ``take``.

    ``authority`` is the bundle: any authority in it may have signed the list. The first reading fails closed: no list,
    no server. A later list that is damaged, unsigned or older is not taken; the last good one stays in force and the
    error is logged.
    """

    def __init__(self, path: Path, authority: Path) -> None:
        self._path = path
        self._authority = authority
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._list = self._verified(read(path, "revocation list"), str(path))
        self._serials = _serials(self._list)
        self._next_check = time.monotonic() + _CHECK_SECONDS
        self._warn_when_stale()

    def __contains__(self, serial: int) -> bool:
        """Whether the certificate with this serial is revoked."""
        with self._lock:
            if time.monotonic() >= self._next_check:
                self._next_check = time.monotonic() + _CHECK_SECONDS
                self._follow()
            return serial in self._serials

    @property
    def pem(self) -> bytes:
        """The list in force."""
        with self._lock:
            return self._list.public_bytes(Encoding.PEM)

    def take(self, pem: bytes) -> bool:
        """Put a list in force and keep it; return False when it is not newer than the one in force.

        Raises ``CertificateError`` when it is not this federation's, or cannot be written; in the latter case it is
        in force until the process ends, and may be handed over again.
        """
        new = self._verified(pem, "the revocation list that was handed over")
        with self._lock:
            # What lies in the file counts, too: another process may have written it a moment ago.
            self._follow()
            if list_number(new) <= list_number(self._list):
                return False
            # A full disk must not keep a holder in.
            self._serials = _serials(new)
            write_atomic(self._path, new.public_bytes(Encoding.PEM))
            self._list, self._seen = new, self._signature()
        _log.info("revocation list taken: %d serials", len(self._serials))
        return True

    def _follow(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            new = self._verified(read(self._path, "revocation list"), str(self._path))
        except CertificateError as error:
            _log.error("the last good revocation list stays in force: %s", error)
            return
        if list_number(new) < list_number(self._list):
            _log.error("%s is older than the revocation list in force; not taken", self._path)
            return
        self._list, self._serials = new, _serials(new)
        self._warn_when_stale()
        _log.info("revocation list read: %d serials", len(self._serials))

    def _signature(self) -> tuple[int, int, int] | None:
        """Tell one version of the file from the next."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _verified(self, data: bytes, what: str) -> x509.CertificateRevocationList:
        """Read a list; raise ``CertificateError`` unless an authority of this federation signed it."""
        return verified_list(
            data, load_certificates(self._authority, "authority certificate"), what
        )

    def _warn_when_stale(self) -> None:
        end = self._list.next_update_utc
        if end is not None and end < datetime.now(UTC):
            _log.warning(
                "%s is stale since %s; run 'vlafleet certs list' on the authority's machine",
                self._path,
                end.isoformat(),
            )


def verified_list(
    data: bytes, authorities: Iterable[x509.Certificate], what: str
) -> x509.CertificateRevocationList:
    """Read a list (PEM); raise ``CertificateError`` naming ``what`` unless one of the authorities signed it."""
    try:
        crl = x509.load_pem_x509_crl(data)
        numbered = any(isinstance(one.value, x509.CRLNumber) for one in crl.extensions)
    except ValueError as error:
        raise CertificateError(f"{what} is not a PEM revocation list") from error
    if not any(_is_signed_by(crl, authority) for authority in authorities):
        raise CertificateError(f"{what} was not signed by this federation's authority")
    if not numbered:
        raise CertificateError(f"{what} has no CRL number; it is not this authority's")
    return crl


def _is_signed_by(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    return isinstance(key, ec.EllipticCurvePublicKey) and crl.is_signature_valid(key)


def list_number(crl: x509.CertificateRevocationList) -> int:
    """Return the number that tells the newer of two lists (RFC 5280, 5.2.3)."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _serials(crl: x509.CertificateRevocationList) -> frozenset[int]:
    return frozenset(entry.serial_number for entry in crl)
