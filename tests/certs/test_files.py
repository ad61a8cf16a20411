"""Files are replaced whole, with the mode they need; what cannot be read is named."""

import os
from pathlib import Path

import pytest

from certs.authority import Authority
from certs.errors import CertificateError
from certs.files import load_certificate, load_certificates, pem_certificate, write_atomic


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o644)])
def test_a_file_is_replaced_with_its_mode(tmp_path: Path, private: bool, mode: int) -> None:
    path = tmp_path / "new" / "file"
    before = os.umask(0o077 if not private else 0)
    try:
        for data in (b"first", b"second"):
            write_atomic(path, data, private=private)
    finally:
        os.umask(before)
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == mode
    assert os.listdir(path.parent) == ["file"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(CertificateError, match=r"file cannot be written: Is a directory"):
        write_atomic(tmp_path / "file", b"")
    assert os.listdir(tmp_path) == ["file"]


def test_a_bundle_is_read_in_order(authority: Authority, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other", "test").certificate
    path = tmp_path / "ca.crt"
    path.write_bytes(
        b"a comment\n" + pem_certificate(authority.certificate) + b"\n" + pem_certificate(other)
    )
    assert load_certificates(path, "authority certificate") == [authority.certificate, other]
    assert load_certificate(path) == authority.certificate


@pytest.mark.parametrize("data", [b"", b"x", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_file_without_a_certificate_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ca.crt").write_bytes(data)
    with pytest.raises(CertificateError, match=r"the bundle .*ca\.crt is not a PEM certificate"):
        load_certificates(tmp_path / "ca.crt", "bundle")


def test_a_key_is_no_certificate(authority: Authority) -> None:
    with pytest.raises(CertificateError, match="is not a PEM certificate"):
        load_certificates(authority.directory / "ca.key")


def test_a_bundle_with_a_damaged_certificate_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    """Half of a bundle would be another trust than the one that was written."""
    good = pem_certificate(authority.certificate)
    (tmp_path / "ca.crt").write_bytes(good + good.replace(b"MII", b"AAA", 1))
    with pytest.raises(CertificateError, match="is not a PEM certificate"):
        load_certificates(tmp_path / "ca.crt")
