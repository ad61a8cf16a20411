"""The revocation list is followed live, and only forwards."""

import logging
import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from certs import revocations
from certs.authority import Authority
from certs.errors import CertificateError
from certs.revocations import Revocations
from certs.roles import Role
from tests.serving import backdate


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    monkeypatch.setattr(revocations, "_CHECK_SECONDS", 0.0)
    return Authority.init(tmp_path / "ca", "lab")


def issue(authority: Authority, name: str) -> int:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return authority.issue(key, Role.SITE, name).serial_number


def test_a_new_list_is_followed(fresh: Authority) -> None:
    followed = Revocations(fresh.crl, fresh.directory / "ca.crt")
    one, two = issue(fresh, "one"), issue(fresh, "two")
    assert one not in followed
    fresh.revoke(Role.SITE, "one")
    assert one in followed
    assert two not in followed


@pytest.mark.parametrize("damage", ["missing", "garbled", "foreign", "older"])
def test_the_last_good_list_stays_in_force(
    fresh: Authority, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    empty = fresh.crl.read_bytes()
    serial = issue(fresh, "one")
    fresh.revoke(Role.SITE, "one")
    followed = Revocations(fresh.crl, fresh.directory / "ca.crt")
    assert serial in followed
    foreign = Authority.init(tmp_path / "foreign", "lab")
    replacement = {"garbled": b"x", "foreign": foreign.crl.read_bytes(), "older": empty}
    new = fresh.crl.with_name("new")
    if damage == "missing":
        fresh.crl.unlink()
    else:
        new.write_bytes(replacement[damage])
        os.replace(new, fresh.crl)
    with caplog.at_level(logging.ERROR):
        assert serial in followed
    assert caplog.records, "the operator must be told"


@pytest.mark.parametrize("damage", ["missing", "garbled", "foreign"])
def test_no_good_list_no_server(fresh: Authority, tmp_path: Path, damage: str) -> None:
    foreign = Authority.init(tmp_path / "foreign", "lab")
    if damage == "missing":
        fresh.crl.unlink()
    else:
        fresh.crl.write_bytes(b"x" if damage == "garbled" else foreign.crl.read_bytes())
    with pytest.raises(CertificateError):
        Revocations(fresh.crl, fresh.directory / "ca.crt")


def revoked_list(authority: Authority, name: str) -> tuple[int, bytes]:
    """Revoke a new certificate; return its serial and the list, which is not where the server looks."""
    serial = issue(authority, name)
    authority.revoke(Role.SITE, name)
    return serial, authority.crl.read_bytes()


@pytest.fixture
def kept(fresh: Authority, tmp_path: Path) -> Path:
    """Where a server keeps its list."""
    path = tmp_path / "server" / "crl.pem"
    path.parent.mkdir()
    path.write_bytes(fresh.crl.read_bytes())
    return path


def test_a_list_that_is_handed_over_is_in_force_at_once_and_kept(
    fresh: Authority, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "_CHECK_SECONDS", 1e6)  # nothing rests on following the file
    taken = Revocations(kept, fresh.directory / "ca.crt")
    serial, new = revoked_list(fresh, "one")
    assert serial not in taken
    assert taken.take(new) is True
    assert serial in taken
    assert kept.read_bytes() == new
    assert serial in Revocations(kept, fresh.directory / "ca.crt")
    assert taken.take(new) is False
    assert serial in taken


def test_an_older_list_is_not_taken(fresh: Authority, kept: Path) -> None:
    taken = Revocations(kept, fresh.directory / "ca.crt")
    empty = fresh.crl.read_bytes()
    serial, new = revoked_list(fresh, "one")
    assert taken.take(new)
    assert taken.take(empty) is False
    assert serial in taken
    assert kept.read_bytes() == new


def test_what_lies_in_the_file_counts_before_what_is_handed_over(
    fresh: Authority, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'vlafleet certs revoke' on the same machine wrote a newer list a moment ago."""
    monkeypatch.setattr(revocations, "_CHECK_SECONDS", 1e6)
    taken = Revocations(kept, fresh.directory / "ca.crt")
    _, older = revoked_list(fresh, "one")
    serial, newer = revoked_list(fresh, "two")
    kept.write_bytes(newer)
    assert taken.take(older) is False
    assert kept.read_bytes() == newer
    assert serial in taken


@pytest.mark.parametrize("damage", ["foreign", "garbled", "empty", "truncated", "altered"])
def test_only_this_federations_list_is_taken(
    fresh: Authority, kept: Path, tmp_path: Path, damage: str
) -> None:
    taken = Revocations(kept, fresh.directory / "ca.crt")
    before = kept.read_bytes()
    serial, good = revoked_list(fresh, "one")
    foreign = Authority.init(tmp_path / "foreign", "lab")
    lines = good.splitlines(keepends=True)
    middle = len(lines) // 2
    letter = b"A" if lines[middle][:1] != b"A" else b"B"
    bad = {
        "foreign": foreign.crl.read_bytes(),
        "garbled": b"x",
        "empty": b"",
        "truncated": good[:-60],
        "altered": b"".join([*lines[:middle], letter + lines[middle][1:], *lines[middle + 1 :]]),
    }[damage]
    with pytest.raises(CertificateError, match="the revocation list that was handed over"):
        taken.take(bad)
    assert serial not in taken
    assert kept.read_bytes() == before


def test_a_list_is_in_force_even_where_it_cannot_be_kept(
    fresh: Authority, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Revocations(kept, fresh.directory / "ca.crt")
    serial, new = revoked_list(fresh, "one")

    def full(path: Path, _data: bytes) -> None:
        raise CertificateError(f"{path} cannot be written: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(revocations, "write_atomic", full)
        with pytest.raises(CertificateError, match="No space left"):
            taken.take(new)
    assert serial in taken
    assert taken.take(new) is True, "handed over again, it is kept"
    assert kept.read_bytes() == new


def test_any_authority_of_the_bundle_may_have_signed(
    fresh: Authority, kept: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "server" / "ca.crt"
    old = (fresh.directory / "ca.crt").read_bytes()
    bundle.write_bytes(old)
    taken = Revocations(kept, bundle)
    successor = Authority.init(tmp_path / "successor", "lab")
    serial, new = revoked_list(successor, "one")
    with pytest.raises(CertificateError, match="was not signed by this federation's authority"):
        taken.take(new)
    bundle.write_bytes(old + successor.bundle)
    assert taken.take(new)
    assert serial in taken
    bundle.write_bytes(successor.bundle)
    late, retired = revoked_list(fresh, "two")
    with pytest.raises(CertificateError, match="was not signed by this federation's authority"):
        taken.take(retired)
    assert late not in taken
    assert serial in taken


def test_a_stale_list_stays_in_force_and_is_told(
    fresh: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serial = issue(fresh, "one")
    with monkeypatch.context() as patched:
        backdate(patched, timedelta(days=31))
        fresh.revoke(Role.SITE, "one")
    with caplog.at_level(logging.WARNING):
        assert serial in Revocations(fresh.crl, fresh.directory / "ca.crt")
    assert "is stale since" in caplog.text


def test_threads_see_one_list_or_the_next(fresh: Authority, kept: Path) -> None:
    """Handed over and looked up at once: none that was revoked is ever let in again, and the newest is kept."""
    taken = Revocations(kept, fresh.directory / "ca.crt")
    lists = [revoked_list(fresh, f"site-{number}") for number in range(8)]
    let_in: list[int] = []
    ended = threading.Event()

    def look() -> None:
        seen: set[int] = set()
        while not ended.is_set():
            for serial, _ in lists:
                if serial in taken:
                    seen.add(serial)
                elif serial in seen:
                    let_in.append(serial)

    looking = threading.Thread(target=look)
    looking.start()
    handing = [threading.Thread(target=taken.take, args=(pem,)) for _, pem in lists]
    for thread in handing:
        thread.start()
    for thread in handing:
        thread.join()
    ended.set()
    looking.join()
    assert let_in == []
    assert kept.read_bytes() == lists[-1][1]
    assert all(serial in taken for serial, _ in lists)
