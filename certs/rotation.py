"""Replace a federation's authority by its next generation while everything runs.

Three steps on the authority's machine, each of one atomic write of the bundle ``ca.crt``, so that a crash leaves the
step before or the step after; asked for again, a step does what is left of it:

- ``begin`` makes the next key and certificate. The bundle is [current, next]; the current key goes on signing. Holders
  get the bundle with their next certificate.
- ``switch`` makes the next key sign: [next, old]. Refused while a holder's certificate was issued before ``begin``: it
  would not trust what is signed from now on.
- ``finish`` drops the old authority: [next]. Refused while a certificate that the old key signed is valid. The old key
  is deleted.

That a certificate was issued does not prove that its holder stored it: who was handed one and crashed before that asks
again with the one it has, which the enrolment service accepts until ``finish``. An invitation names the authority that
signed when it was made: those open at ``switch`` are to be made anew.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from cryptography import x509

from certs.authority import Authority, generation, self_signed
from certs.errors import CertificateError
from certs.files import ensure_key, load_key, pem_certificate, sync_directory, write_atomic
from certs.index import Issued

# More names than this do not fit a sentence.
_NAMES = 10


class Phase(StrEnum):
    """Where a replacement is."""

    NONE = "none"
    BEGUN = "begun"
    SWITCHED = "switched"


@dataclass(frozen=True)
class Rotation:
    """Where a replacement is, and the certificates that the next step waits for."""

    phase: Phase
    signing: x509.Certificate
    other: x509.Certificate | None
    waiting: list[Issued]


def status(authority: Authority) -> Rotation:
    """Return where the replacement of an authority is."""
    signing, *others = authority.certificates()
    if not others:
        return Rotation(Phase.NONE, signing, None, [])
    if len(others) > 1:
        raise CertificateError(
            f"{authority.directory / 'ca.crt'} holds {1 + len(others)} certificates, not one or two; "
            "restore the directory from its backup"
        )
    (other,) = others
    if generation(other) > generation(signing):
        waiting = [line for line in _newest(authority) if generation(other) not in line.authorities]
        return Rotation(Phase.BEGUN, signing, other, waiting)
    waiting = [line for line in _valid(authority) if line.authorities[0] == generation(other)]
    return Rotation(Phase.SWITCHED, signing, other, waiting)


def describe(rotation: Rotation) -> list[str]:
    """Return what ``vlafleet certs rotate`` prints: who signs, what comes next, and who is waited for."""
    signing = rotation.signing
    expires = f"{signing.not_valid_after_utc:%Y-%m-%d} UTC"
    lines = [f"authority {generation(signing)} signs, and expires on {expires}"]
    if rotation.other is None:
        return [*lines, "nothing is being replaced"]
    other = generation(rotation.other)
    if rotation.phase is Phase.BEGUN:
        lines.append(f"authority {other} is trusted by whoever got a certificate since 'begin'")
        step, lacks = "switch", "has not got one yet"
    else:
        lines.append(f"authority {other} is trusted still, and signs nothing any more")
        lines.append("invitations from before 'switch' let nobody in any more: make them anew")
        step, lacks = "finish", f"holds a certificate that authority {other} signed"
    lines += [
        f"{line.role} {line.name} {lacks}: {line.serial:x}, valid until "
        f"{line.not_after:%Y-%m-%d %H:%M} UTC"
        for line in rotation.waiting
    ]
    wait = (
        f"'{step}' waits for these {len(rotation.waiting)}"
        if rotation.waiting
        else f"next: '{step}'"
    )
    return [*lines, wait]


def begin(authority: Authority) -> Rotation:
    """Make the next authority, and have everybody trust it from their next certificate on."""
    with authority.locked():
        now = status(authority)
        if now.phase is Phase.SWITCHED:
            raise CertificateError(
                f"{authority.directory} is still being replaced: 'finish' before the next 'begin'"
            )
        if now.phase is Phase.NONE:
            _settle(authority)
            # An interrupted attempt left at most a key, which nothing was signed with: it is used.
            key = ensure_key(authority.directory / "next.key")
            next_ = self_signed(key, authority.federation, generation(now.signing) + 1)
            _write(authority, now.signing, next_)
        return status(authority)


def switch(authority: Authority) -> Rotation:
    """Sign with the next authority's key from now on."""
    with authority.locked():
        now = status(authority)
        if now.other is None:
            raise CertificateError(f"{authority.directory} is not being replaced: 'begin' first")
        if now.phase is Phase.BEGUN:
            if now.waiting:
                raise CertificateError(
                    f"{_named(now.waiting)} would be cut off: their certificates are from before "
                    "'begin'. Wait until they have renewed them, issue them again, or revoke those "
                    "who left"
                )
            _write(authority, now.other, now.signing)
        authority.sign_revocations()
        return status(authority)


def finish(authority: Authority) -> Rotation:
    """Trust the next authority alone, and delete the old one's key."""
    with authority.locked():
        now = status(authority)
        if now.phase is Phase.BEGUN:
            raise CertificateError(
                f"the next authority of {authority.directory} signs nothing yet: 'switch' first"
            )
        if now.waiting:
            last = max(line.not_after for line in now.waiting)
            raise CertificateError(
                f"{_named(now.waiting)} would be cut off: the old authority signed certificates that "
                f"are valid until {last:%Y-%m-%d %H:%M} UTC at the latest. Wait until then, or "
                "revoke those who left"
            )
        # Before the old certificate goes, with which a list it signed goes out of force.
        authority.sign_revocations()
        if now.phase is Phase.SWITCHED:
            _write(authority, now.signing)
        _settle(authority)
        return status(authority)


def _settle(authority: Authority) -> None:
    """Put the key that signs in the old one's place, where 'finish' dropped the old certificate already."""
    next_ = authority.directory / "next.key"
    if next_.exists() and load_key(next_).public_key() == authority.certificate.public_key():
        next_.replace(authority.directory / "ca.key")
        sync_directory(authority.directory)


def _write(authority: Authority, *bundle: x509.Certificate) -> None:
    write_atomic(authority.directory / "ca.crt", b"".join(map(pem_certificate, bundle)))


def _valid(authority: Authority) -> list[Issued]:
    """Return every certificate that some clock may still accept."""
    now = datetime.now(UTC)
    return [
        line for line in authority.issued() if line.revoked_at is None and not line.forgotten(now)
    ]


def _newest(authority: Authority) -> list[Issued]:
    """Return the newest valid certificate of each holder."""
    return list({(line.role, line.name): line for line in _valid(authority)}.values())


def _named(waiting: list[Issued]) -> str:
    names = list(dict.fromkeys(f"{line.role} {line.name}" for line in waiting))
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
