"""An identity in two places, a Secret of a cluster and the volume of the process that renews it: which copy is newer.

The newer one wins, and nothing else ever replaces an identity: not another holder's, not the same holder's under an
authority that the present copy does not know. Where the authority was replaced meanwhile (``certs/rotation.py``), the
later generation of the same federation may follow.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from cryptography import x509

from certs.authority import generation
from certs.errors import CertificateError
from certs.files import load_certificate, parse_key, read, write_atomic
from certs.identity import Identity, IdentityFiles, hosts_of, read_identity, store_identity
from certs.revocations import list_number, verified_list
from certs.roles import Peer, Role

_LIST = "crl.pem"
# What an identity consists of beside its key, certificate and authority. A node key without its public half does not
# occur: the private one is written last.
_BESIDE = {
    Role.SUPERLINK: (_LIST,),
    Role.EXPORTER: (_LIST,),
    Role.SITE: ("node.pub", "node.key"),
}


@dataclass(frozen=True)
class Copy:
    """An identity as it lies in one place; ``where`` names the place in sentences."""

    where: Path
    identity: IdentityFiles
    beside: Mapping[str, bytes] = field(repr=False)
    certificate: x509.Certificate
    peer: Peer

    @classmethod
    def of(cls, where: Path, files: Mapping[str, bytes]) -> Self:
        """Read the copy in these files; raise ``CertificateError`` when they are no identity."""
        missing = [name for name in ("tls.key", "tls.crt", "ca.crt") if not files.get(name)]
        if missing:
            raise CertificateError(
                f"{where} holds no identity: {', '.join(missing)} is missing; fill it again, or remove it"
            )
        return cls._checked(
            IdentityFiles(where, files["tls.key"], files["tls.crt"], files["ca.crt"]), files
        )

    @classmethod
    def read(cls, directory: Path, *, private: bool = True) -> Self | None:
        """Read the copy in a directory, None where there is none; as ``read_identity``."""
        identity = read_identity(directory, private=private)
        if identity is None:
            return None
        names = {name for names in _BESIDE.values() for name in names}
        files = {
            name: read(directory / name, name)
            for name in sorted(names)
            if (directory / name).exists()
        }
        if read_identity(directory, private=private) != identity:
            # A mounted Secret was exchanged in between, or the identity renewed.
            return cls.read(directory, private=private)
        return cls._checked(identity, files)

    @classmethod
    def _checked(cls, identity: IdentityFiles, files: Mapping[str, bytes]) -> Self:
        certificate = identity.check()
        peer = Peer.of(certificate)
        beside = {name: files[name] for name in _BESIDE.get(peer.role, ()) if files.get(name)}
        if peer.role is Role.SITE and len(beside) < 2:
            raise CertificateError(
                f"{identity.directory} is the identity of a site without its SuperNode key (node.key, node.pub); "
                "fill it again with all of it"
            )
        return cls(identity.directory, identity, beside, certificate, peer)

    @property
    def files(self) -> dict[str, bytes]:
        """All of it, by name."""
        identity = self.identity
        return {
            "tls.key": identity.key,
            "tls.crt": identity.certificate,
            "ca.crt": identity.authority,
            **self.beside,
        }

    @property
    def is_over(self) -> bool:
        """Whether its certificate has expired."""
        return self.certificate.not_valid_after_utc <= datetime.now(UTC)

    def follows(self, other: "Copy") -> bool:
        """Whether it is the newer one of two of one holder; what is over is older than what is not."""
        if self.is_over != other.is_over:
            return other.is_over
        return self.certificate.not_valid_before_utc > other.certificate.not_valid_before_utc

    def require_holder(self, peer: Peer) -> None:
        """Raise ``CertificateError`` unless it is this holder's."""
        if self.peer.uri != peer.uri:
            raise CertificateError(
                f"{self.where} holds the identity {self.peer.uri}, and {peer.uri} is to go there; "
                "nothing was changed. Name another place, or remove what is there"
            )

    def require_known(self, authorities: Iterable[x509.Certificate]) -> None:
        """Raise ``CertificateError`` unless it knows one of the authorities, or they replaced the ones it knows."""
        authorities, known = list(authorities), self.identity.authorities()
        if set(authorities) & set(known):
            return
        with contextlib.suppress(CertificateError):
            if min(map(generation, authorities)) > max(map(generation, known)):
                return
        raise CertificateError(
            f"{self.where} holds the identity {self.peer.uri} of another authority of that name; nothing was changed. "
            "If the authority was lost, restore it from its backup; if the federation was made anew on purpose, "
            "remove what is there"
        )


def merged(there: Copy, new: Copy) -> dict[str, bytes]:
    """Return ``new``, or ``there`` if that is newer, with the newer revocation list that its authority signed."""
    base = there if there.follows(new) else new
    found = newest_list(base, there, new)
    return base.files if found is None else {**base.files, _LIST: found}


def newest_list(base: Copy, *copies: Copy) -> bytes | None:
    """Return the newest revocation list in the copies that an authority of ``base`` signed; None for who needs none."""
    if _LIST not in _BESIDE.get(base.peer.role, ()):
        return None
    lists: list[tuple[int, bytes]] = []
    why = "there is none"
    for copy in copies:
        if _LIST in copy.beside:
            try:
                crl = verified_list(
                    copy.beside[_LIST], base.identity.authorities(), str(copy.where / _LIST)
                )
            except CertificateError as error:
                why = str(error)
            else:
                lists.append((list_number(crl), copy.beside[_LIST]))
    if not lists:
        raise CertificateError(
            f"{base.peer.role} {base.peer.name!r} needs a revocation list of its authority in {base.where}: {why}"
        )
    return max(lists)[1]


def take(source: Path, directory: Path, hosts: Sequence[str] = ()) -> Literal["taken", "kept"]:
    """Take the identity in ``source``, whatever its modes, into ``directory``, unless the one there is as new.

    What goes there is private. A crash leaves the old identity or the new one. Raises ``CertificateError`` when
    ``directory`` is somebody else's, or its certificate in the end is over or not good for one of ``hosts``.
    """
    new = Copy.read(source, private=False)
    if new is None:
        raise CertificateError(
            f"{source} holds no identity: there is no tls.crt; fill it, then this goes on"
        )
    outcome = into(directory, new, Copy.read(directory))
    identity = Identity.load(directory, *Role)
    missing = sorted(set(hosts) - set(hosts_of(load_certificate(identity.certificate))))
    if missing:
        raise CertificateError(
            f"the certificate of {identity.peer.role} in {directory} is not good for {', '.join(missing)}, "
            f"nor is the one in {source}; issue it again with --host"
        )
    return outcome


def into(directory: Path, new: Copy, there: Copy | None) -> Literal["taken", "kept"]:
    """Put a copy into a directory that holds ``there``, unless that is as new."""
    if there is None:
        base, lists = new, newest_list(new, new)
    else:
        there.require_holder(new.peer)
        base = new if new.follows(there) else there
        if base is new:
            _require_successor(there, new)
        lists = newest_list(base, there, new)
    beside = {**base.beside, **({} if lists is None else {_LIST: lists})}
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CertificateError(
            f"{directory} cannot be made: {error.strerror}; check the directory and its owner"
        ) from error
    for name, data in beside.items():
        if there is None or there.beside.get(name) != data:
            write_atomic(directory / name, data, private=name.endswith(".key"))
    if base is not new:
        return "kept"
    # Last: a directory with a certificate is complete.
    store_identity(
        directory,
        parse_key(new.identity.key, new.where / "tls.key"),
        new.identity.certificate.decode(),
        new.identity.authority.decode(),
    )
    return "taken"


def _require_successor(there: Copy, new: Copy) -> None:
    """Raise ``CertificateError`` unless ``new`` may take the place of ``there``."""
    authorities = new.identity.authorities()
    if not there.is_over and not set(authorities) & set(there.identity.authorities()):
        # An authority ends when all that it signed is over: a living certificate of it contradicts its end.
        raise CertificateError(
            f"{new.where} holds the identity {new.peer.uri} of another authority than the one that {there.where} "
            f"trusts; nothing was changed. If the federation was made anew on purpose, remove {there.where}"
        )
    there.require_known(authorities)
