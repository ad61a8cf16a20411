"""An identity is refused with a sentence unless it can be used, and replaced so that it always can."""

import os
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import certs.identity
from certs.authority import Authority
from certs.errors import CertificateError
from certs.files import load_certificate, load_key, pem_certificate, pem_key
from certs.identity import Identity, ensure_identity, store_identity
from certs.roles import Role


@pytest.fixture
def site(authority: Authority, tmp_path: Path) -> Path:
    ensure_identity(authority, tmp_path / "id", Role.SITE, "site-x", ["localhost"])
    return tmp_path / "id"


def expire(site: Path, authority: Authority) -> None:
    key = load_key(site / "tls.key").public_key()
    old = authority.issue(key, Role.SITE, "site-x", lifetime=timedelta(seconds=-1))
    (site / "tls.crt").write_bytes(pem_certificate(old))


def other_key(site: Path, authority: Authority) -> None:
    (site / "tls.key").unlink()
    ensure_identity(authority, site.parent / "other", Role.SITE, "site-y")
    shutil.copy(site.parent / "other" / "tls.key", site / "tls.key")


def other_authority(site: Path, authority: Authority) -> None:
    foreign = Authority.init(site.parent / "foreign", "test")
    (site / "ca.crt").write_bytes(pem_certificate(foreign.certificate))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda site, _: (site / "tls.crt").unlink(),
            r"certificate .*tls.crt cannot be read: No such file",
        ),
        (
            lambda site, _: (site / "tls.key").unlink(),
            r"private key .*tls.key cannot be read: No such file",
        ),
        (
            lambda site, _: (site / "ca.crt").unlink(),
            r"authority certificate .*ca.crt cannot be read",
        ),
        (lambda site, _: (site / "tls.crt").write_text("x"), "is not a PEM certificate"),
        (lambda site, _: (site / "tls.key").write_text("x"), "is not an unencrypted PEM key"),
        (lambda site, _: (site / "tls.key").chmod(0o644), "open to every user; run 'chmod 600"),
        (expire, "is valid from .* issue it again or correct the clock"),
        (other_key, "do not belong together"),
        (other_authority, "was not issued by the authority"),
    ],
)
def test_damage_is_named(
    site: Path, authority: Authority, damage: Callable[[Path, Authority], None], sentence: str
) -> None:
    Identity.load(site, Role.SITE)
    damage(site, authority)
    with pytest.raises(CertificateError, match=sentence):
        Identity.load(site, Role.SITE)


def test_another_role_is_refused(site: Path) -> None:
    with pytest.raises(
        CertificateError,
        match="is the identity of site 'site-x'; this command needs one of role op",
    ):
        Identity.load(site, Role.OPERATOR)


Pair = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


@pytest.fixture
def pair(authority: Authority) -> Callable[[], Pair]:
    """Return a fresh key with its certificate for site-x."""

    def make() -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        return key, authority.issue(key.public_key(), Role.SITE, "site-x", hosts=["localhost"])

    return make


def store(directory: Path, pair: Pair, *authorities: x509.Certificate) -> None:
    bundle = b"".join(map(pem_certificate, authorities)).decode()
    store_identity(directory, pair[0], pem_certificate(pair[1]).decode(), bundle)


def chain(identity: Identity) -> ssl.SSLContext:
    """A context with what the identity lends: OpenSSL itself checks that key and certificate fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with identity.chain() as path:
        context.load_cert_chain(path)
    return context


def test_a_bundle_is_trusted_whole(site: Path, authority: Authority) -> None:
    other = Authority.init(site.parent / "other", "test").certificate
    for bundle in ([other, authority.certificate], [authority.certificate, other]):
        (site / "ca.crt").write_bytes(b"".join(map(pem_certificate, bundle)))
        assert Identity.load(site, Role.SITE).authorities() == bundle


def test_authorities_are_read_anew(site: Path, authority: Authority) -> None:
    identity = Identity.load(site, Role.SITE)
    other = Authority.init(site.parent / "other", "test").certificate
    (site / "ca.crt").write_bytes(pem_certificate(other))
    assert identity.authorities() == [other]
    assert identity.bundle() == pem_certificate(other).decode()


def test_storing_replaces_all_three(
    site: Path, authority: Authority, pair: Callable[[], Pair]
) -> None:
    new, other = pair(), Authority.init(site.parent / "other", "test").certificate
    store(site, new, authority.certificate, other)
    assert load_key(site / "tls.key").public_key() == new[0].public_key()
    assert load_certificate(site / "tls.crt") == new[1]
    assert Identity.load(site, Role.SITE).authorities() == [authority.certificate, other]
    assert {path.name for path in site.iterdir()} == {
        *("tls.key", "tls.crt", "ca.crt", "node.key", "node.pub", ".lock")
    }
    for name in ("tls.key", ".lock"):
        assert (site / name).stat().st_mode & 0o777 == 0o600


def test_a_first_identity_is_stored(
    tmp_path: Path, authority: Authority, pair: Callable[[], Pair]
) -> None:
    store(tmp_path / "new" / "identity", pair(), authority.certificate)
    assert Identity.load(tmp_path / "new" / "identity", Role.SITE).peer.name == "site-x"
    assert (tmp_path / "new" / "identity").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("wrong", ["key", "authority", "certificate", "bundle"])
def test_what_does_not_fit_is_not_stored(
    site: Path, authority: Authority, pair: Callable[[], Pair], wrong: str
) -> None:
    before = {path: path.read_bytes() for path in site.iterdir()}
    key, certificate = pair()
    foreign = Authority.init(site.parent / "other", "test").certificate
    bundle = pem_certificate(foreign if wrong == "authority" else authority.certificate).decode()
    with pytest.raises(
        CertificateError, match=r"belong together|not issued by|is not a PEM certificate"
    ):
        store_identity(
            site,
            pair()[0] if wrong == "key" else key,
            "x" if wrong == "certificate" else pem_certificate(certificate).decode(),
            "" if wrong == "bundle" else bundle,
        )
    assert {path: path.read_bytes() for path in site.iterdir()} == before


class Killed(BaseException):
    """Nothing runs after it, as after a SIGKILL; the kernel closes what was open."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Raise ``Killed`` in place of the n-th change to the disk from now on; 0: never."""
    left = 0

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    def counted(original: Any) -> Any:
        def change(*arguments: Any, **options: Any) -> Any:
            step()
            return original(*arguments, **options)

        return change

    for owner, name in (
        *((os, "open"), (os, "fchmod"), (os, "fsync"), (os, "fdopen")),
        *((Path, "rename"), (Path, "unlink"), (Path, "mkdir")),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))

    def arm(n: int) -> None:
        nonlocal left
        left = n

    yield arm
    monkeypatch.undo()


def test_killed_at_every_step_it_is_the_old_identity_or_the_new(
    site: Path, authority: Authority, pair: Callable[[], Pair], kill_at: Callable[[int], None]
) -> None:
    other = Authority.init(site.parent / "other", "test").certificate
    outcomes, step = [], 0
    while True:
        step += 1
        old, new = pair(), pair()
        store(site, old, authority.certificate)
        kill_at(step)
        try:
            store(site, new, authority.certificate, other)
        except Killed:
            done = False
        else:
            done = True
        finally:
            kill_at(0)
        serial = Identity.load(site, Role.SITE).peer.serial
        outcomes.append(serial == new[1].serial_number)
        assert serial in {old[1].serial_number, new[1].serial_number}
        # Whoever read it has also finished it: the three files themselves fit.
        held = load_certificate(site / "tls.crt")
        assert held.serial_number == serial
        assert load_key(site / "tls.key").public_key() == held.public_key()
        identity = Identity.load(site, Role.SITE)
        assert len(identity.authorities()) == (2 if outcomes[-1] else 1)
        assert not (site / "renewed.pem").exists()
        chain(identity)
        if done:
            break
    assert step > 20
    # The old one up to a step, the new one from there on: nothing flips back.
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def test_no_key_of_a_killed_attempt_stays(
    site: Path,
    authority: Authority,
    pair: Callable[[], Pair],
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for step in range(1, 40):
        monkeypatch.setattr(os, "getpid", lambda step=step: step)  # a process of its own
        kill_at(step)
        try:
            store(site, pair(), authority.certificate)
        except Killed:
            pass
        finally:
            kill_at(0)
    final = pair()
    store(site, final, authority.certificate)
    keys = [path for path in site.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert {path.name for path in keys} == {"tls.key", "node.key"}
    assert (site / "tls.key").read_bytes() == pem_key(final[0])


def test_files_that_are_replaced_one_after_the_other_are_waited_for(
    site: Path, authority: Authority, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an operator's ``cp`` does, or a Kubernetes secret: key and certificate do not fit for a moment."""
    key, certificate = pair()
    (site / "tls.key").write_bytes(pem_key(key))

    def meanwhile(_seconds: float) -> None:
        (site / "tls.crt").write_bytes(pem_certificate(certificate))

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert Identity.load(site, Role.SITE).peer.serial == certificate.serial_number


def test_an_interrupted_replacement_is_usable_where_nothing_can_be_written(
    site: Path,
    authority: Authority,
    pair: Callable[[], Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A container may have the directory read-only: what the record says holds all the same."""

    def refused(*_: object, **__: object) -> None:
        raise CertificateError("read-only file system")

    new = pair()
    monkeypatch.setattr(certs.identity, "_apply", refused)
    with pytest.raises(CertificateError, match="read-only"):
        store(site, new, authority.certificate)
    identity = Identity.load(site, Role.SITE)
    assert identity.peer.serial == new[1].serial_number
    assert load_certificate(site / "tls.crt").serial_number != new[1].serial_number
    chain(identity)


def test_issuing_finishes_an_interrupted_replacement_first(
    site: Path,
    authority: Authority,
    pair: Callable[[], Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new = pair()

    def killed(_new: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(certs.identity, "_apply", killed)
        with pytest.raises(Killed):
            store(site, new, authority.certificate)
    assert ensure_identity(authority, site, Role.SITE, "site-x", ["localhost"]) == "kept"
    assert load_certificate(site / "tls.crt") == new[1]


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_record_is_named(site: Path, damage: bytes | None) -> None:
    record = site / "renewed.pem"
    record.write_bytes((site / "tls.key").read_bytes() if damage is None else damage)
    record.chmod(0o600)
    with pytest.raises(CertificateError, match=r"renewed\.pem is damaged; remove it"):
        Identity.load(site, Role.SITE)


def test_a_record_that_every_user_may_read_is_refused(site: Path) -> None:
    (site / "renewed.pem").write_bytes(b"")
    (site / "renewed.pem").chmod(0o644)
    with pytest.raises(CertificateError, match="open to every user; run 'chmod 600"):
        Identity.load(site, Role.SITE)


def test_a_reader_does_not_wait_for_a_writer(
    site: Path, authority: Authority, pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server reads in its event loop; who replaces the files may be stopped in the midst of it."""
    new, loaded = pair(), []

    def stopped(_new: object) -> None:
        reader = threading.Thread(
            target=lambda: loaded.append(Identity.load(site, Role.SITE)), daemon=True
        )
        reader.start()
        reader.join(20)

    monkeypatch.setattr(certs.identity, "_apply", stopped)
    store(site, new, authority.certificate)
    assert [identity.peer.serial for identity in loaded] == [new[1].serial_number]


def test_readers_never_meet_half_of_a_replacement(
    site: Path, authority: Authority, pair: Callable[[], Pair]
) -> None:
    """Two threads load, one of them into OpenSSL, while a third replaces the identity 200 times."""
    pairs = [pair() for _ in range(8)]
    over, errors = threading.Event(), []
    loads = {"load": 0, "chain": 0}
    identity = Identity.load(site, Role.SITE)

    def read(kind: str) -> None:
        while not over.is_set():
            try:
                if kind == "load":
                    Identity.load(site, Role.SITE)
                else:
                    chain(identity)
                loads[kind] += 1
            except (CertificateError, ssl.SSLError) as error:
                errors.append(error)
                return

    readers = [threading.Thread(target=read, args=(kind,)) for kind in loads]
    for reader in readers:
        reader.start()
    try:
        for number in range(200):
            store(site, pairs[number % len(pairs)], authority.certificate)
    finally:
        over.set()
        for reader in readers:
            reader.join(60)
    assert errors == []
    assert min(loads.values()) > 20
    assert Identity.load(site, Role.SITE).peer.serial == pairs[199 % 8][1].serial_number


def test_a_new_certificate_is_kept_whatever_its_life(authority: Authority, tmp_path: Path) -> None:
    """What is due is a share of the life it was given, not of one that begins before it was signed."""
    directory = tmp_path / "id"
    ensure_identity(authority, directory, Role.SITE, "site-x")
    key = load_key(directory / "tls.key").public_key()
    for lifetime, outcome in ((600, "kept"), (-1, "issued")):
        made = authority.issue(key, Role.SITE, "site-x", lifetime=timedelta(seconds=lifetime))
        (directory / "tls.crt").write_bytes(pem_certificate(made))
        assert ensure_identity(authority, directory, Role.SITE, "site-x") == outcome
