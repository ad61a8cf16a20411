"""Taking an identity out of a Secret: the newer copy wins, and nothing else ever replaces an identity."""

import shutil
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs import rotation
from certs.authority import Authority
from certs.errors import CertificateError
from certs.files import load_certificate, pem_certificate, write_atomic
from certs.identity import Identity, ensure_identity, store_identity
from certs.index import write_index
from certs.lifetime import CLOCK_SKEW
from certs.revocations import list_number
from certs.roles import Role
from certs.take import Copy, take
from tests.conftest import Vlafleet
from tests.joining import files
from tests.past import ago

NAMES = ("tls.key", "tls.crt", "ca.crt")


class Crash(BaseException):
    """What ends a process wherever it is."""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", "test")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Where a pod keeps its identity."""
    return tmp_path / "data" / "identity"


def issue(
    authority: Authority,
    secret: Path,
    role: Role = Role.SUPEREXEC,
    name: str = "superlink",
    hosts: tuple[str, ...] = (),
    **span: float,
) -> Path:
    """Issue an identity ``span`` ago, and return it as a mounted Secret: links to files that everybody may read."""
    made = secret.with_name(f".{secret.name}")
    shutil.rmtree(made, ignore_errors=True)
    with ago(**span):
        ensure_identity(authority, made, role, name, hosts)
    return mount(made, secret)


def mount(identity: Path, secret: Path) -> Path:
    """Show an identity as a kubelet mounts a Secret."""
    shutil.rmtree(secret, ignore_errors=True)
    shutil.copytree(identity, secret / "..2026")
    (secret / "..data").symlink_to("..2026")
    for path in (secret / "..2026").iterdir():
        path.chmod(0o644)
        (secret / path.name).symlink_to(f"..data/{path.name}")
    return secret


def renew(directory: Path, authority: Authority, **span: float) -> int:
    """Renew an identity ``span`` ago, as its process does; return the serial."""
    peer = Identity.load(directory, *Role).peer
    key = ec.generate_private_key(ec.SECP256R1())
    with ago(**span):
        certificate = authority.issue(key.public_key(), peer.role, peer.name)
    pem = pem_certificate(certificate).decode()
    store_identity(directory, key, pem, authority.bundle.decode())
    return certificate.serial_number


def serial(directory: Path) -> int:
    return load_certificate(directory / "tls.crt").serial_number


def number(path: Path) -> int:
    return list_number(x509.load_pem_x509_crl(path.read_bytes()))


def replaced(authority: Authority) -> None:
    """Replace an authority, as if all that it ever signed had expired."""
    rotation.begin(authority)
    _forget(authority)
    rotation.switch(authority)
    _forget(authority)
    rotation.finish(authority)


def _forget(authority: Authority) -> None:
    past = datetime.now(UTC) - 2 * CLOCK_SKEW
    lines = [replace(line, not_after=past) for line in authority.issued()]
    write_index(authority.directory / "issued.jsonl", lines)


def test_an_empty_volume_gets_a_private_copy(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    secret = issue(authority, tmp_path / "secret", Role.SITE, "lab-7")
    assert take(secret, volume) == "taken"
    for name in (*NAMES, "node.key", "node.pub"):
        assert (volume / name).read_bytes() == (secret / name).read_bytes()
    for name in ("tls.key", "node.key"):
        assert stat.S_IMODE((volume / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(volume.stat().st_mode) == 0o700
    before = files(volume)
    assert take(secret, volume) == "kept"
    assert files(volume) == before


def test_what_was_renewed_since_is_kept(authority: Authority, volume: Path, tmp_path: Path) -> None:
    secret = issue(authority, tmp_path / "secret", days=4)
    take(secret, volume)
    renewed = renew(volume, authority)
    assert take(secret, volume) == "kept"
    assert serial(volume) == renewed
    # A Secret that is over by now says no more than that it is old.
    secret = issue(authority, secret, days=8)
    assert take(secret, volume) == "kept"
    assert serial(volume) == renewed


def test_a_newer_secret_is_taken(authority: Authority, volume: Path, tmp_path: Path) -> None:
    """Invited again after a revocation: other keys, the SuperNode's among them."""
    take(issue(authority, tmp_path / "secret", Role.SITE, "lab-7", days=1), volume)
    renew(volume, authority, hours=1)
    first = (volume / "node.key").read_bytes()
    secret = issue(authority, tmp_path / "secret", Role.SITE, "lab-7")
    assert take(secret, volume) == "taken"
    for name in (*NAMES, "node.key", "node.pub"):
        assert (volume / name).read_bytes() == (secret / name).read_bytes()
    assert (volume / "node.key").read_bytes() != first


def test_what_is_good_wins_over_what_is_over(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    take(issue(authority, tmp_path / "first", hours=1), volume)
    expired = issue(authority, tmp_path / "expired", days=8)
    assert take(expired, volume) == "kept"
    other = tmp_path / "other"
    with pytest.raises(CertificateError, match="valid from"):
        take(expired, other)
    assert take(tmp_path / "first", other) == "taken"
    assert serial(other) == serial(tmp_path / "first")


def test_another_holders_identity_stays(authority: Authority, volume: Path, tmp_path: Path) -> None:
    take(issue(authority, tmp_path / "mine", Role.OPERATOR, "admin", days=1), volume)
    before = files(volume)
    secret = issue(authority, tmp_path / "theirs", Role.MONITOR, "prometheus")
    with pytest.raises(CertificateError, match="holds the identity spiffe://test/operator/admin"):
        take(secret, volume)
    assert files(volume) == before


def test_another_authoritys_identity_stays(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    """A federation of the same name, whose authority is another: a lost volume, or another cluster."""
    take(issue(authority, tmp_path / "mine", days=1), volume)
    before = files(volume)
    impostor = Authority.init(tmp_path / "other", "test")
    with pytest.raises(CertificateError, match="of another authority"):
        take(issue(impostor, tmp_path / "theirs"), volume)
    # Nor does it help to say that it is a later one: what the present one signed lives.
    replaced(impostor)
    with pytest.raises(CertificateError, match="of another authority"):
        take(issue(impostor, tmp_path / "theirs"), volume)
    assert files(volume) == before
    # What is over is not given up for another authority of the same generation either.
    shutil.rmtree(volume)
    store_expired(authority, volume, tmp_path)
    with pytest.raises(CertificateError, match="of another authority"):
        take(issue(Authority.init(tmp_path / "third", "test"), tmp_path / "theirs"), volume)


def store_expired(authority: Authority, volume: Path, scratch: Path) -> None:
    with pytest.raises(CertificateError, match="valid from"):
        take(issue(authority, scratch / "expired", days=8), volume)


def test_the_authority_may_have_been_replaced_meanwhile(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    # The process followed, the Secret did not.
    secret, off = issue(authority, tmp_path / "secret", days=5), tmp_path / "off"
    take(secret, volume)
    store_expired(authority, off, tmp_path)
    replaced(authority)
    renewed = renew(volume, authority)
    assert take(secret, volume) == "kept"
    assert serial(volume) == renewed
    # The Secret followed, the process was off until what it held was over.
    assert take(issue(authority, secret), off) == "taken"
    assert serial(off) == serial(secret)


def test_the_newer_revocation_list_wins(authority: Authority, volume: Path, tmp_path: Path) -> None:
    first = issue(authority, tmp_path / "first", Role.SUPERLINK)
    take(first, volume)
    assert (volume / "crl.pem").read_bytes() == (first / "crl.pem").read_bytes()
    second = mount(first / "..2026", tmp_path / "second")
    authority.renew_crl()
    (second / "..2026" / "crl.pem").write_bytes(authority.crl.read_bytes())
    assert take(second, volume) == "kept"
    assert number(volume / "crl.pem") == number(second / "crl.pem")
    take(first, volume)
    assert number(volume / "crl.pem") == number(second / "crl.pem")
    # Handed over live: newer than any Secret's.
    authority.renew_crl()
    write_atomic(volume / "crl.pem", authority.crl.read_bytes())
    take(second, volume)
    assert number(volume / "crl.pem") == number(authority.crl)


def test_a_list_of_another_authority_is_not_taken(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    secret = issue(authority, tmp_path / "secret", Role.EXPORTER, "exporter")
    other = Authority.init(tmp_path / "other", "test")
    path = secret / "..2026" / "crl.pem"
    good = path.read_bytes()
    path.write_bytes(other.crl.read_bytes())
    with pytest.raises(CertificateError, match=r"needs a revocation list .* was not signed by"):
        take(secret, volume)
    assert not volume.exists()
    path.write_bytes(good)
    take(secret, volume)
    path.write_bytes(other.crl.read_bytes())
    assert take(secret, volume) == "kept"
    assert (volume / "crl.pem").read_bytes() == good


def test_what_is_incomplete_is_not_taken(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    secret = issue(authority, tmp_path / "secret", Role.SITE, "lab-7")
    (secret / "node.key").unlink()
    with pytest.raises(CertificateError, match="without its SuperNode key"):
        take(secret, volume)
    (secret / "tls.crt").unlink()
    with pytest.raises(CertificateError, match="holds no identity"):
        take(secret, volume)
    assert not volume.exists()
    secret = issue(authority, tmp_path / "secret", Role.SITE, "lab-7")
    strange = issue(authority, tmp_path / "strange")
    (secret / "..2026" / "tls.key").write_bytes((strange / "tls.key").read_bytes())
    with pytest.raises(CertificateError, match="do not belong together"):
        take(secret, volume)
    assert not volume.exists()


@pytest.mark.parametrize("renewed", [False, True])
def test_a_crash_leaves_what_was_or_what_comes(
    authority: Authority,
    volume: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    renewed: bool,
) -> None:
    """At every step of the disk; taken again, it ends as if nothing had happened."""
    first = issue(authority, tmp_path / "first", Role.SITE, "lab-7", days=1)
    second = issue(authority, tmp_path / "second", Role.SITE, "lab-7")
    whole = tmp_path / "whole"
    take(second, whole)
    rename = Path.rename
    steps, left = 0, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Crash
        left -= 1
        return rename(self, target)

    while True:
        shutil.rmtree(volume, ignore_errors=True)
        if renewed:
            take(first, volume)
        left = steps
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            try:
                take(second, volume)
                break
            except Crash:
                pass
        # Whoever starts with it now has one of the two.
        found = Copy.read(volume) if (volume / "node.key").exists() else None
        assert found is None or found.peer.serial in {serial(first), serial(second)}
        take(second, volume)
        made = {name: data for name, data in files(volume).items() if not name.startswith(".")}
        assert made == {
            name: data for name, data in files(whole).items() if not name.startswith(".")
        }
        steps += 1
    assert steps == 6  # two of the SuperNode key, the record, and three files


def test_the_certificate_has_to_be_good_for_its_hosts(
    authority: Authority, volume: Path, tmp_path: Path
) -> None:
    """A Secret that is about to be replaced by one with another host is not enough: the pod tries again."""
    secret = issue(
        authority, tmp_path / "secret", Role.SUPERLINK, hosts=("localhost", "127.0.0.1"), days=1
    )
    assert take(secret, volume, ["localhost", "127.0.0.1"]) == "taken"
    with pytest.raises(CertificateError, match=r"not good for fleet\.example"):
        take(secret, volume, ["localhost", "fleet.example"])
    secret = issue(authority, secret, Role.SUPERLINK, hosts=("localhost", "fleet.example"))
    assert take(secret, volume, ["localhost", "fleet.example"]) == "taken"


def test_the_command(
    authority: Authority, volume: Path, tmp_path: Path, vlafleet: Vlafleet
) -> None:
    secret = issue(authority, tmp_path / "secret")
    done = vlafleet("certs", "take", secret, volume)
    assert done.stdout.startswith("taken: spiffe://test/superexec/superlink until 20")
    assert vlafleet("certs", "take", secret, volume).stdout.startswith("kept: spiffe://test/")
    done = vlafleet("certs", "take", tmp_path / "nothing", volume)
    assert (done.returncode, done.stderr.count("\n")) == (10, 1)
    assert "holds no identity" in done.stderr
