"""``vlafleet site enrol``: become a member from within a Kubernetes cluster, and keep the identities as Secrets.

The site's directory is where an interrupted enrolment goes on; the Secrets are what stays. The SuperNode's is written
first: whoever has it gets the SuperExec's by a renewal, so that an invitation is spent once.

A Secret is over after a site certificate's life, while the site's processes renew their own copies. So what is over,
with an invitation that is over, too, is a site that joined long ago, and no failure.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from certs.cluster import Cluster
from certs.cluster_pki import store
from certs.enrolment import signing_request
from certs.errors import (
    CertificateError,
    ConnectionRefusedByFleetError,
    FleetError,
    InvitationError,
)
from certs.identity import Identity, store_identity
from certs.invitation import Invitation
from certs.renewal import ask
from certs.roles import Peer, Role, spiffe_id
from certs.take import Copy, into
from supernode.enrol import inviter, refuse_unfit, untrusted
from supernode.join import Say, become_member
from supernode.presence import is_refused, presence
from supernode.site import Site, absolute_dataset, default_directory, locked


@dataclass(frozen=True)
class Secrets:
    """The Secrets of a site's SuperNode and SuperExec; the latter's namespace, None for the pod's own."""

    identity: str
    superexec: str
    superexec_namespace: str | None = None

    def read(self, cluster: Cluster) -> list[Copy]:
        """Return what they hold, the SuperNode's first; raise ``CertificateError`` unless it is one site's."""
        copies: list[Copy] = []
        for name, namespace, role in (
            (self.identity, None, Role.SITE),
            (self.superexec, self.superexec_namespace, Role.SUPEREXEC),
        ):
            files = cluster.read(name, namespace)
            if files is not None:
                copy = Copy.of(Path(f"the Secret {name}"), files)
                _require(copy, role, copies[0].peer if copies else copy.peer)
                copies.append(copy)
        return copies

    def store(self, cluster: Cluster, site: Site, say: Say) -> None:
        """Let them hold the identities in the site's directory."""
        for name, namespace, directory in (
            (self.identity, None, site.identity),
            (self.superexec, self.superexec_namespace, site.superexec),
        ):
            copy = Copy.read(directory)
            if copy is None:  # removed since
                raise CertificateError(f"{directory} holds no identity")
            say(f"secret      {name}: {store(cluster, name, copy, namespace)}")


def enrol(
    cluster: Cluster,
    secrets: Secrets,
    invitation: Invitation | None,
    superlink: str,
    dataset: str,
    directory: Path | None,
    say: Say,
) -> None:
    """Make sure that the Secrets hold a membership that the SuperLink at ``superlink`` (``host:port``) takes.

    Raises ``FleetError``; interrupted, it is run again with the same directory.
    """
    there = secrets.read(cluster)
    site = _planned(invitation, there, dataset, directory)
    known = Site.find(site.directory)
    if known is not None:
        known.require(site.federation, site.name)
    for copy in there:
        _require(copy, copy.peer.role, site)
    existed = site.directory.exists()
    with locked(site.directory):
        _take_up(site, there)
        if _is_member(replace(site, superlink=superlink), say):
            if _current(site, Role.SUPEREXEC) is None:
                _renew_superexec(site, invitation, say)
        elif not _join(site, invitation, there, existed, say):
            return
        secrets.store(cluster, site, say)


def _planned(
    invitation: Invitation | None, there: list[Copy], dataset: str, directory: Path | None
) -> Site:
    """Return the site that the invitation, or else a Secret, names."""
    if invitation is not None:
        federation, name = invitation.federation, invitation.site
    elif there:
        federation, name = there[0].peer.federation, there[0].peer.name
    else:
        raise InvitationError(
            "the Secrets hold no membership yet, and no invitation was given: ask the federation's operator for one, "
            "and hand it over as VLAFLEET_INVITATION"
        )
    directory = (directory or default_directory(name)).absolute()
    return Site(directory, federation, name, "", "", absolute_dataset(dataset), "cpu", "helm")


def _require(copy: Copy, role: Role, peer: Peer | Site) -> None:
    """Raise ``CertificateError`` unless a Secret holds the identity of this role, of the site of ``peer``."""
    wanted = spiffe_id(peer.federation, role, peer.name)
    if copy.peer.uri != wanted:
        raise CertificateError(
            f"{copy.where} holds the identity {copy.peer.uri}, and {wanted} is to go there; nothing was changed. "
            "Name another Secret, or remove this one"
        )


def _take_up(site: Site, there: list[Copy]) -> None:
    """Go on with what the Secrets hold, unless the directory is on its way to another membership already."""
    if not there or there[0].peer.role is not Role.SITE:
        return
    key = site.identity / "node.key"
    if key.exists() and key.read_bytes() != there[0].beside["node.key"]:
        return
    for copy, directory in zip(there, (site.identity, site.superexec), strict=False):
        into(directory, copy, Copy.read(directory))


def _current(site: Site, role: Role) -> Identity | None:
    """Return the identity of this role in the site's directory, None unless it is complete and current."""
    directory = site.identity if role is Role.SITE else site.superexec
    try:
        identity = Identity.load(directory, role)
    except FleetError:
        return None
    mine = (identity.peer.federation, identity.peer.name) == (site.federation, site.name)
    return identity if mine else None


def _is_member(site: Site, say: Say) -> bool:
    """Whether the directory holds a site's identity that the SuperLink takes, or cannot be asked about."""
    if _current(site, Role.SITE) is None:
        return False
    if is_refused(site):
        say(f"membership  the SuperLink no longer takes {site.name}'s certificate")
        return False
    try:
        presence(site)
    except FleetError as error:
        why = untrusted(error)
        if why is not None:
            say(
                f"membership  {site.superlink} is not of the federation that {site.name} belongs to: {why}"
            )
            return False
    say(f"membership  {site.name} is a member of {site.federation}; no invitation is needed")
    return True


def _join(
    site: Site, invitation: Invitation | None, there: list[Copy], existed: bool, say: Say
) -> bool:
    """Become a member by the invitation; return False where there is nothing to do for a site that joined long ago."""
    joined = bool(there) and there[0].peer.role is Role.SITE and there[0].is_over
    try:
        if invitation is None:
            raise InvitationError(
                f"{site.name} is to be invited again: its operator hands the invitation over as VLAFLEET_INVITATION"
            )
        refuse_unfit(invitation, site.federation, site.name)
        authority = x509.load_pem_x509_certificate(inviter(invitation).encode())
        for copy in there:
            copy.require_known([authority])
        become_member(site, invitation, existed, say)
    except InvitationError as error:
        if not joined:
            raise
        say(
            f"membership  {there[0].where} was over on {there[0].certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
            f"as it is for a site that renews its own copy; and {error}"
        )
        return False
    return True


def _renew_superexec(site: Site, invitation: Invitation | None, say: Say) -> None:
    """Get the SuperExec's identity with the SuperNode's, as a running SuperNode does for it."""
    if invitation is None:
        raise InvitationError(
            f"{site.name} is a member, but its SuperExec has no certificate: hand its invitation over once more as "
            "VLAFLEET_INVITATION, which says where the enrolment service is; it is not spent"
        )
    identity = Identity.load(site.identity, Role.SITE)
    key = ec.generate_private_key(ec.SECP256R1())
    csr = signing_request(key, site.federation, Role.SUPEREXEC, site.name)
    answer = ask(identity, invitation.address, {"csr": csr, "role": Role.SUPEREXEC})
    refused = ConnectionRefusedByFleetError(
        f"the enrolment service at {invitation.address} answers {answer.status_code} and gives the SuperExec of "
        f"{site.name} no certificate; its log says why"
    )
    if answer.status_code != httpx.codes.OK:
        raise refused
    try:
        record = answer.json()
        certificate, authority = str(record["certificate"]), str(record["authority"])
        peer = Peer.of(x509.load_pem_x509_certificate(certificate.encode()))
    except (ValueError, KeyError, TypeError) as error:
        raise refused from error
    if peer.uri != spiffe_id(site.federation, Role.SUPEREXEC, site.name):
        raise refused
    store_identity(site.superexec, key, certificate, authority)
    say(f"superexec   certificate until {peer.not_after:%Y-%m-%d %H:%M} UTC")
