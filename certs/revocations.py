"""The revoked serials, read live from the authority's signed list."""

import logging
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs.errors import CertificateError
from certs.files import load_certificate, read

_log = logging.getLogger("vlafleet.certs")

# How often the list's file is looked at: an evicted site is out within this time, and a stat a second costs nothing.
_CHECK_SECONDS = 1.0


class Revocations:
    """A revocation list (RFC 5280) that follows its file.

    The first reading fails closed: no list, no server. A later list that is damaged, unsigned or older is not taken;
    the last good one stays in force and the error is logged.
    """

    def __init__(self, path: Path, authority: Path) -> None:
        self._path = path
        key = load_certificate(authority, "authority certificate").public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise CertificateError(f"the authority {authority} has no elliptic-curve key")
        self._authority = key
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._list = self._read()
        self._serials = _serials(self._list)
        self._next_check = time.monotonic() + _CHECK_SECONDS

    def __contains__(self, serial: int) -> bool:
        """Whether the certificate with this serial is revoked."""
        with self._lock:
            if time.monotonic() >= self._next_check:
                self._next_check = time.monotonic() + _CHECK_SECONDS
                self._follow()
            return serial in self._serials

    def _follow(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            new = self._read()
        except CertificateError as error:
            _log.error("the last good revocation list stays in force: %s", error)
            return
        if _number(new) < _number(self._list):
            _log.error("%s is older than the revocation list in force; not taken", self._path)
            return
        self._list, self._serials = new, _serials(new)
        _log.info("revocation list read: %d serials", len(self._serials))

    def _signature(self) -> tuple[int, int, int] | None:
        """Tell one version of the file from the next."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size

    def _read(self) -> x509.CertificateRevocationList:
        data = read(self._path, "revocation list")
        try:
            crl = x509.load_pem_x509_crl(data)
        except ValueError as error:
            raise CertificateError(f"{self._path} is not a PEM revocation list") from error
        if not crl.is_signature_valid(self._authority):
            raise CertificateError(f"{self._path} was not signed by this federation's authority")
        if not any(isinstance(extension.value, x509.CRLNumber) for extension in crl.extensions):
            raise CertificateError(f"{self._path} has no CRL number; it is not this authority's")
        if crl.next_update_utc is not None and crl.next_update_utc < datetime.now(UTC):
            _log.warning(
                "%s is stale since %s; run 'vlafleet certs list' on the authority's machine",
                self._path,
                crl.next_update_utc.isoformat(),
            )
        return crl


def _number(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _serials(crl: x509.CertificateRevocationList) -> frozenset[int]:
    return frozenset(entry.serial_number for entry in crl)
