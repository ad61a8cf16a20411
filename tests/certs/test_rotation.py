"""The authority is replaced while its federation works: nobody is cut off, and no crash leaves it unable to sign."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from certs import rotation
from certs.authority import Authority, generation
from certs.cli import cli
from certs.contexts import client_context
from certs.errors import CertificateError
from certs.files import load_key
from certs.identity import (
    Identity,
    authority_directory,
    ensure_federation,
    identity_directory,
    publish_crl,
)
from certs.index import write_index
from certs.lifetime import CLOCK_SKEW
from certs.revocations import Revocations
from certs.roles import Role
from certs.rotation import Phase, Rotation
from tests.serving import renew, serving

KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
type Step = Callable[[Authority], Rotation]


@pytest.fixture
def lab(tmp_path: Path) -> Authority:
    """An authority with one site."""
    authority = Authority.init(tmp_path / "ca", "lab")
    issue(authority)
    return authority


def issue(authority: Authority, name: str = "lab-1") -> x509.Certificate:
    return authority.issue(KEY, Role.SITE, name)


def forget(authority: Authority, *serials: int) -> None:
    """Let certificates have expired long ago."""
    past = datetime.now(UTC) - 2 * CLOCK_SKEW
    lines = [
        replace(line, not_after=past) if line.serial in serials else line
        for line in authority.issued()
    ]
    write_index(authority.directory / "issued.jsonl", lines)


def generations(authority: Authority) -> list[int]:
    return [generation(certificate) for certificate in authority.certificates()]


def signs(authority: Authority) -> int:
    """The generation that signs, proven by a certificate and by the revocation list."""
    signing = authority.certificate
    issue(authority, "probe").verify_directly_issued_by(signing)
    authority.renew_crl()
    crl = x509.load_pem_x509_crl(authority.crl.read_bytes())
    key = signing.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)
    assert crl.issuer == signing.subject
    return generation(signing)


def test_a_whole_replacement(lab: Authority) -> None:
    old_key = load_key(lab.directory / "ca.key").private_numbers()
    assert rotation.status(lab).phase is Phase.NONE
    first = lab.issued()[0].serial

    begun = rotation.begin(lab)
    assert (begun.phase, [line.serial for line in begun.waiting]) == (Phase.BEGUN, [first])
    assert generations(lab) == [1, 2]
    assert signs(lab) == 1
    assert (lab.directory / "next.key").stat().st_mode & 0o777 == 0o600

    # The certificate it had before is still valid; what counts is that it got a newer one.
    second = issue(lab)
    assert rotation.switch(lab).phase is Phase.SWITCHED
    assert generations(lab) == [2, 1]
    assert signs(lab) == 2
    third = issue(lab)
    assert not lab.is_current(second)
    assert lab.is_current(third)

    with pytest.raises(CertificateError, match="site lab-1, site probe would be cut off"):
        rotation.finish(lab)
    old = [line.serial for line in lab.issued() if line.authorities[0] == 1]
    assert second.serial_number in old
    forget(lab, *old)
    assert rotation.finish(lab).phase is Phase.NONE
    assert generations(lab) == [2]
    assert signs(lab) == 2
    assert lab.is_current(third)
    assert not (lab.directory / "next.key").exists()
    assert load_key(lab.directory / "ca.key").private_numbers() != old_key
    # And the one after.
    rotation.begin(lab)
    assert generations(lab) == [2, 3]


def test_switch_waits_for_whoever_has_not_got_the_bundle(lab: Authority) -> None:
    issue(lab, "lab-2")
    rotation.begin(lab)
    issue(lab, "lab-1")
    with pytest.raises(CertificateError, match=r"^site lab-2 would be cut off"):
        rotation.switch(lab)
    assert generations(lab) == [1, 2]
    # One who left is not waited for once revoked.
    lab.revoke(Role.SITE, "lab-2")
    assert rotation.switch(lab).phase is Phase.SWITCHED
    assert lab.issued()[-1].authorities == (1, 2)


def test_finish_waits_for_what_the_old_key_signed_unless_it_is_revoked(lab: Authority) -> None:
    rotation.begin(lab)
    issue(lab)
    rotation.switch(lab)
    with pytest.raises(CertificateError, match=r"site lab-1 would be cut off: .* until 20\d\d-"):
        rotation.finish(lab)
    assert generations(lab) == [2, 1]
    lab.revoke(Role.SITE, "lab-1")
    rotation.finish(lab)
    assert generations(lab) == [2]


def test_the_sentence_names_ten_and_counts_the_rest(lab: Authority) -> None:
    for number in range(12):
        issue(lab, f"robot-{number:02}")
    rotation.begin(lab)
    with pytest.raises(CertificateError, match="site robot-08 and 3 more would be"):
        rotation.switch(lab)
    said = rotation.describe(rotation.status(lab))
    assert sum("has not got one yet" in line for line in said) == 13


def test_steps_out_of_order_are_refused(lab: Authority) -> None:
    with pytest.raises(CertificateError, match="'begin' first"):
        rotation.switch(lab)
    assert rotation.finish(lab).phase is Phase.NONE  # as after a finish
    rotation.begin(lab)
    with pytest.raises(CertificateError, match="'switch' first"):
        rotation.finish(lab)
    issue(lab)
    rotation.switch(lab)
    with pytest.raises(CertificateError, match="'finish' before the next 'begin'"):
        rotation.begin(lab)


def test_certificates_from_before_begin_are_not_current(lab: Authority) -> None:
    """'vlafleet certs issue' and 'certs demo' issue them again."""
    before = issue(lab)
    assert lab.is_current(before)
    rotation.begin(lab)
    assert not lab.is_current(before)
    assert lab.is_current(issue(lab))


@pytest.mark.parametrize("step", [rotation.begin, rotation.switch, rotation.finish])
def test_a_step_that_was_cut_short_is_done_again(
    lab: Authority, step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at every write in turn: the authority signs what the bundle verifies, and the step can be repeated."""
    steps: list[Step] = [rotation.begin, rotation.switch, rotation.finish]
    for before in steps[: steps.index(step)]:
        issue(lab)
        before(lab)
    if step is rotation.switch:
        issue(lab)
    if step is rotation.finish:
        forget(lab, *(line.serial for line in lab.issued() if line.authorities[0] == 1))
    done = [Phase.BEGUN, Phase.SWITCHED, Phase.NONE][steps.index(step)]
    bundle, keys = contents(lab)

    for cut in range(8):
        restore(lab, bundle, keys)
        with monkeypatch.context() as patch:
            cut_short(patch, cut)
            try:
                step(lab)
            except KeyboardInterrupt:
                pass
            else:
                break
        leaf = issue(lab)
        leaf.verify_directly_issued_by(lab.certificate)
        if step is rotation.finish:
            forget(lab, *(line.serial for line in lab.issued() if line.authorities[0] == 1))
        assert step(lab).phase is done
        assert step(lab).phase is done
        assert signs(lab) == (1 if step is rotation.begin else 2)
        assert (lab.directory / "next.key").exists() == (step is not rotation.finish)
    else:
        raise AssertionError("the step has more writes than this test cuts")
    assert cut >= 2


def contents(authority: Authority) -> tuple[bytes, dict[str, bytes]]:
    keys = {path.name: path.read_bytes() for path in authority.directory.glob("*.key")}
    return authority.bundle, keys


def restore(authority: Authority, bundle: bytes, keys: dict[str, bytes]) -> None:
    for path in authority.directory.glob("*.key"):
        path.unlink()
    for name, data in keys.items():
        (authority.directory / name).write_bytes(data)
        (authority.directory / name).chmod(0o600)
    (authority.directory / "ca.crt").write_bytes(bundle)


def cut_short(patch: pytest.MonkeyPatch, cut: int) -> None:
    """Let the process end before its ``cut``-th rename."""
    seen = iter(range(cut))
    for name in ("rename", "replace"):
        original = getattr(Path, name)

        def cutting(
            self: Path, target: Path, original: Callable[[Path, Path], Path] = original
        ) -> Path:
            if next(seen, None) is None:
                raise KeyboardInterrupt
            return original(self, target)

        patch.setattr(Path, name, cutting)


# --- with everything running ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [Role.SUPERLINK, Role.SITE])
def test_nobody_is_cut_off_and_nobody_gets_back_in(tmp_path: Path, first: Role) -> None:
    """A SuperLink and a site that never restart, whoever of the two renews first; and a site that was evicted."""
    pki = tmp_path / "pki"
    for _ in ensure_federation(pki, "lab", ["lab-1", "evicted"]):
        pass
    authority = Authority.load(authority_directory(pki))
    names = {Role.SUPERLINK: "superlink", Role.SITE: "lab-1"}
    held = {
        role: Identity.load(identity_directory(pki, role, name), role)
        for role, name in names.items()
    }
    evicted = Identity.load(identity_directory(pki, Role.SITE, "evicted"), Role.SITE)
    authority.revoke(Role.SITE, "evicted")
    publish_crl(pki, authority)
    for line in authority.issued():
        if (line.role, line.name) not in {*names.items(), (Role.SITE, "evicted")}:
            authority.revoke(line.role, line.name)
    superlink, site = held[Role.SUPERLINK], held[Role.SITE]
    context, out = client_context(site), client_context(evicted)
    revocations = Revocations(superlink.crl, superlink.authority)
    with serving(superlink, revocations) as running:

        def check() -> None:
            answer = httpx.get(f"{running.url}/echo", verify=context, timeout=20)
            assert answer.status_code == 200
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{running.url}/echo", verify=out, timeout=20)
            # As the SuperLink would find its files at a start.
            assert evicted.peer.serial in Revocations(superlink.crl, superlink.authority)

        check()
        for step in (rotation.begin, rotation.switch):
            step(authority)
            publish_crl(pki, authority)
            check()
            for role in sorted(held, key=lambda role: role is not first):
                renew(held[role], authority)
                check()
        old = [line for line in authority.issued() if line.authorities[0] == 1]
        forget(authority, *(line.serial for line in old if line.revoked_at is None))
        rotation.finish(authority)
        publish_crl(pki, authority)
        check()
        for role in sorted(held, key=lambda role: role is not first):
            renew(held[role], authority)
            check()
    assert [generation(certificate) for certificate in superlink.authorities()] == [2]


def test_the_command_takes_each_step(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    runner = CliRunner()

    def certs(*arguments: str) -> str:
        done = runner.invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    demo = ("demo", str(pki), "--site", "lab-1")
    certs(*demo)
    assert "nothing is being replaced" in certs("rotate", str(pki), "status")
    assert "site lab-1 has not got one yet" in certs("rotate", str(pki), "begin")
    with pytest.raises(CertificateError, match="would be cut off"):
        runner.invoke(cli, ["rotate", str(pki), "switch"], catch_exceptions=False)
    assert "kept" not in certs(*demo)
    said = certs("rotate", str(pki), "switch")
    assert "'finish' waits for these" in said
    assert "invitations from before 'switch'" in said
    # The SuperLink's list is signed anew.
    crl = identity_directory(pki, Role.SUPERLINK, "superlink") / "crl.pem"
    assert (
        x509.load_pem_x509_crl(crl.read_bytes())
        .issuer.rfc4514_string()
        .startswith("CN=demo authority 2")
    )
    assert "kept" not in certs(*demo)
    authority = Authority.load(authority_directory(pki))
    forget(authority, *(line.serial for line in authority.issued() if line.authorities[0] == 1))
    assert "authority 2 signs" in certs("rotate", str(pki), "finish")
    assert certs(*demo).count("kept") == 8
    listed = certs("list", str(pki)).splitlines()[1:]
    assert {line.split()[5] for line in listed} == {"2"}


def test_a_certificate_that_is_not_due_is_not_renewed(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    for _ in ensure_federation(pki, "lab", ["lab-1"]):
        pass
    directory = identity_directory(pki, Role.SITE, "lab-1")
    before = (directory / "tls.crt").read_bytes()
    # Nothing listens there: it is not asked.
    arguments = ["renew", str(directory), "--enrolment", "localhost:1"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.output.startswith("kept: spiffe://lab/site/lab-1 is not due before ")
    assert (directory / "tls.crt").read_bytes() == before
