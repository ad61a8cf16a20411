"""Key and certificate files: private modes, atomic replacement, sentences instead of tracebacks."""

import contextlib
import os
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.errors import CertificateError


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace ``path`` by ``data`` in one step (temporary file, fsync, rename); private files have mode 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
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
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CertificateError(
            f"{path} cannot be written: {error.strerror}; check the directory and its owner"
        ) from error


def sync_directory(directory: Path) -> None:
    """Let what was renamed or removed in a directory outlive a power cut, in that order."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, what: str) -> bytes:
    """Read a file; raise ``CertificateError`` naming ``what`` and where when that fails."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, what, error) from error


def _unreadable(path: Path, what: str, error: OSError) -> CertificateError:
    return CertificateError(
        f"the {what} {path} cannot be read: {error.strerror}; "
        "issue it with 'vlafleet certs issue' or correct the path"
    )


def load_certificate(path: Path, what: str = "certificate") -> x509.Certificate:
    """Read one PEM certificate (the first of a chain or a bundle)."""
    return load_certificates(path, what)[0]


def load_certificates(path: Path, what: str = "certificate") -> list[x509.Certificate]:
    """Read the PEM certificates of a file, at least one."""
    return parse_certificates(read(path, what), path, what)


def parse_certificates(data: bytes, path: Path, what: str) -> list[x509.Certificate]:
    """Read the PEM certificates in what was read from ``path``, at least one."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise CertificateError(f"the {what} {path} is not a PEM certificate") from error


def read_private(path: Path) -> bytes:
    """Read the file of a private key; refuse one that every user may read."""
    try:
        with path.open("rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read()
    except OSError as error:
        raise _unreadable(path, "private key", error) from error
    if mode & 0o007:
        raise CertificateError(
            f"the private key {path} is open to every user; run 'chmod 600 {path}'"
        )
    return data


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a PEM private key on an elliptic curve; refuse one that every user may read."""
    return parse_key(read_private(path), path)


def parse_key(data: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the PEM private key in what was read from ``path``."""
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
