"""Key and certificate files: private modes, atomic replacement, sentences instead of tracebacks."""

import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.errors import CertificateError


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace ``path`` by ``data`` in one step (temporary file, fsync, rename); private files have mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    mode = 0o600 if private else 0o644
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask and an old temporary file say
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CertificateError(
            f"{path} cannot be written: {error.strerror}; check the directory and its owner"
        ) from error


def read(path: Path, what: str) -> bytes:
    """Read a file; raise ``CertificateError`` naming ``what`` and where when that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"the {what} {path} cannot be read: {error.strerror}; "
            "issue it with 'vlafleet certs issue' or correct the path"
        ) from error


def load_certificate(path: Path, what: str = "certificate") -> x509.Certificate:
    """Read one PEM certificate (the first of a chain)."""
    try:
        return x509.load_pem_x509_certificate(read(path, what))
    except ValueError as error:
        raise CertificateError(f"the {what} {path} is not a PEM certificate") from error


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a PEM private key on an elliptic curve; refuse one that every user may read."""
    data = read(path, "private key")
    if path.stat().st_mode & 0o007:
        raise CertificateError(
            f"the private key {path} is open to every user; run 'chmod 600 {path}'"
        )
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"the private key {path} is not an unencrypted PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"the private key {path} is not an elliptic-curve key")
    return key


def ensure_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the key at ``path``, making an EC P-256 key (mode 0600) only where there is none."""
    if path.exists():
        return load_key(path)
    key = ec.generate_private_key(ec.SECP256R1())
    write_atomic(path, pem_key(key), private=True)
    return key


def pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def pem_certificate(certificate: x509.Certificate) -> bytes:
    """Encode a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)
