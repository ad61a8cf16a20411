"""Who is a member: admitting a site with its keys, and evicting it.

A member is a site whose SuperNode key Flower knows under its name and whose certificates are good. Both are given here,
and taken, one site at a time.
"""

import base64
import binascii
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from certs.authority import Authority
from certs.enrolment import Application, Membership, keys_fingerprint
from certs.errors import CertificateError, ConnectionRefusedByFleetError, StorageError
from certs.files import pem_certificate, write_atomic
from certs.roles import Role
from superlink.control import Node
from superlink.invitations import Invitations
from superlink.refused import Refused


class Registry(Protocol):
    """Flower's register of SuperNodes (``superlink.control.Control``)."""

    def every_node(self) -> list[Node]:
        """Return every SuperNode that is or was registered."""

    def register_key(
        self, name: str, key: ec.EllipticCurvePublicKey
    ) -> Literal["registered", "kept"]:
        """Register a SuperNode key under a site's name, unless it is."""

    def unregister(self, node_id: int) -> None:
        """Unregister a SuperNode; its key can never be registered again."""


Connect = Callable[[], AbstractContextManager[Registry]]


@dataclass(frozen=True)
class Candidate:
    """A site that asks to be a member, and the keys that it has proven to hold."""

    site: str
    key: ec.EllipticCurvePublicKey
    superexec_key: ec.EllipticCurvePublicKey
    node_key: ec.EllipticCurvePublicKey

    @property
    def fingerprint(self) -> str:
        """What an invitation remembers of the keys that it was used by (SHA-256, hex)."""
        return keys_fingerprint(self.key, self.superexec_key, self.node_key)


@dataclass(frozen=True)
class Eviction:
    """What a revocation did, and, as a clause, what it could not do yet."""

    certificates: int
    invitations: int
    unregistered: bool
    open: str = ""


def candidate(record: Any, federation: str) -> Candidate:
    """Read an application for membership and prove its keys; raise ``Refused`` otherwise."""
    try:
        application = Application.from_json(record)
    except CertificateError as error:
        raise Refused("malformed", str(error)) from error
    if application.federation != federation:
        raise Refused(
            "federation",
            f"this is the federation {federation!r}, not {application.federation!r}",
        )
    try:
        return Candidate(application.site, *application.keys())
    except CertificateError as error:
        raise Refused("proof", str(error)) from error


def invitation_secret(text: Any) -> bytes:
    """Return the secret of an invitation from its base64url; raise ``Refused`` for anything else."""
    # 16 bytes are 22 characters, or 24 with their padding.
    if isinstance(text, str) and len(text) <= 24:
        text = text.rstrip("=")
        with contextlib.suppress(binascii.Error, ValueError):
            secret = base64.b64decode(text + "==", altchars=b"-_", validate=True)
            # The last character has four bits to spare: one text for one secret.
            if len(secret) == 16 and base64.urlsafe_b64encode(secret) == f"{text}==".encode():
                return secret
    raise Refused("malformed", "an invitation is 16 bytes in base64url")


class Members:
    """The federation's members; one thread at a time changes them.

    ``superlink`` and ``enrolment`` are ``host:port`` as the sites reach them. ``connect`` opens Flower's register;
    ``on_revoked`` is called, and must not wait, when the revocation list has changed.
    """

    def __init__(
        self,
        authority: Path,
        state: Path,
        invitations: Invitations,
        connect: Connect,
        on_revoked: Callable[[], None],
        *,
        superlink: str,
        enrolment: str,
        site_lifetime: timedelta,
    ) -> None:
        self._authority = authority
        self._invitations = invitations
        self._connect = connect
        self._on_revoked = on_revoked
        self._addresses = (superlink, enrolment)
        self._site_lifetime = site_lifetime
        self._lock = threading.Lock()
        self._evictions = _Evictions(state / "evictions.json")

    def enrol(self, secret: bytes, site: Candidate) -> tuple[Membership, str]:
        """Admit a site that was invited; return its membership and the invitation's id.

        Until the invitation expires, the same keys get an answer again: the first may not have arrived. Whatever
        fails on the way leaves the invitation to these keys.
        """
        fingerprint = site.fingerprint
        with self._lock:
            entry = self._invitations.require(secret, site.site, fingerprint)
            membership = self._admit(site)
            self._invitations.use(entry, fingerprint)
        return membership, entry.id

    def approve(self, site: Candidate) -> Membership:
        """Admit a site that an operator vouches for."""
        with self._lock:
            return self._admit(site)

    def is_member(self, site: str) -> bool:
        """Whether a machine is registered under the site's name; a certificate stands for it without a SuperLink."""
        try:
            return any(node.name == site for node in self.nodes() if _lives(node))
        except Refused:
            now = datetime.now(UTC)
            return any(
                (line.role, line.name) == (Role.SITE, site) and line.state(now) == "valid"
                for line in Authority.load(self._authority).issued()
            )

    def nodes(self) -> list[Node]:
        """Return every SuperNode that is or was registered; raise ``Refused`` when the SuperLink does not answer."""
        with self._registry() as registry:
            return registry.every_node()

    def revoke(self, site: str) -> Eviction:
        """Evict a site: its certificates and invitations end now, whether or not the SuperLink answers.

        Where it does not, ``finish_evictions`` completes it. Raises ``Refused`` for a site that is unknown.
        """
        with self._lock:
            authority = Authority.load(self._authority)
            known = {(line.role, line.name) for line in authority.issued()}
            invited = any(entry["site"] == site for entry in self._invitations.listed())
            if (Role.SITE, site) not in known and not invited:
                raise Refused(
                    "unknown",
                    f"the federation has no site {site!r}; 'vlafleet site list' shows them",
                )
            # Noted first: should this process end in between, the next one goes on.
            self._evictions.add(site)
            certificates, invitations = self._shut_out(site)
            # Before the SuperLink is asked for anything: this one matters most.
            self._on_revoked()
            try:
                unregistered = self._unregister(site)
            except Refused as error:
                left = f"its SuperNode may still be registered ({error.detail})"
                return Eviction(certificates, invitations, False, left)
        return Eviction(certificates, invitations, unregistered)

    def finish_evictions(self, finished: Callable[[str], None]) -> None:
        """Complete what ``revoke`` could not; raise ``Refused`` when the SuperLink still does not answer.

        ``finished`` hears of each site.
        """
        with self._lock:
            for site in self._evictions.open:
                self._shut_out(site)
                self._unregister(site)
                finished(site)

    def _shut_out(self, site: str) -> tuple[int, int]:
        """End a site's certificates and invitations; return how many of each."""
        invitations = self._invitations.cancel(site)
        authority = Authority.load(self._authority)
        known = {(line.role, line.name) for line in authority.issued()}
        certificates = sum(
            len(authority.revoke(role, site))
            for role in (Role.SITE, Role.SUPEREXEC)
            if (role, site) in known
        )
        return certificates, invitations

    def _unregister(self, site: str) -> bool:
        found = False
        with self._registry() as registry:
            for node in registry.every_node():
                if node.name == site and _lives(node):
                    registry.unregister(node.node_id)
                    found = True
        self._evictions.remove(site)
        return found

    def _admit(self, site: Candidate) -> Membership:
        if site.site in self._evictions.open:
            # The machine that was evicted would count as the one that holds the name.
            self._unregister(site.site)
        with self._registry() as registry:
            _require_no_conflict(registry.every_node(), site)
            try:
                registry.register_key(site.site, site.node_key)
            except CertificateError as error:
                raise Refused("member", str(error)) from error
        authority = Authority.load(self._authority)
        # The names a SuperNode answers its SuperExec at, natively and in compose.
        hosts = ["localhost", "127.0.0.1", site.site, "supernode"]
        lifetime = self._site_lifetime
        certificate = authority.issue(
            site.key, Role.SITE, site.site, hosts=hosts, lifetime=lifetime
        )
        superexec = authority.issue(
            site.superexec_key, Role.SUPEREXEC, site.site, lifetime=lifetime
        )
        return Membership(
            authority.federation,
            site.site,
            pem_certificate(certificate).decode(),
            pem_certificate(superexec).decode(),
            authority.bundle.decode(),
            *self._addresses,
        )

    @contextlib.contextmanager
    def _registry(self) -> Iterator[Registry]:
        try:
            with self._connect() as registry:
                yield registry
        except ConnectionRefusedByFleetError as error:
            raise Refused("unavailable", str(error)) from error


class _Evictions:
    """The sites whose eviction has begun, in a file, so that it ends whatever happens to the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.open: list[str] = json.loads(path.read_bytes()) if path.exists() else []
        except (OSError, ValueError) as error:
            raise StorageError(
                f"the evictions {path} cannot be read ({error}); move the file away and revoke "
                "again the sites that 'vlafleet site list' still shows as members"
            ) from error

    def add(self, site: str) -> None:
        if site not in self.open:
            self._write([*self.open, site])

    def remove(self, site: str) -> None:
        if site in self.open:
            self._write([each for each in self.open if each != site])

    def _write(self, sites: list[str]) -> None:
        write_atomic(self._path, json.dumps(sites).encode(), private=True)
        self.open = sites


def _lives(node: Node) -> bool:
    return node.status != "unregistered"


def _require_no_conflict(nodes: list[Node], site: Candidate) -> None:
    # As Flower keeps it (flwr.supercore.primitives.asymmetric.public_key_to_bytes).
    key = site.node_key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for node in nodes:
        if node.public_key == key and not _lives(node):
            raise Refused(
                "retired-key",
                f"the SuperNode key of {site.site} was unregistered and cannot come back: make a new one",
            )
        if node.public_key == key and node.name != site.site:
            raise Refused(
                "member",
                f"this SuperNode key belongs to the site {node.name!r}: make one for {site.site}",
            )
        if node.public_key != key and node.name == site.site and _lives(node):
            raise Refused(
                "member",
                f"another machine is the site {site.site}: its operator revokes it first, or "
                "invites this one under another name",
            )
