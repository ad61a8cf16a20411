"""A federation's authority and identities on one pod's volume, and copies of them as Secrets for the other pods.

The authority's key never leaves the volume. Those who run with a copy renew it themselves; what the volume has is for
whoever begins, and for whoever lost theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from certs import rotation
from certs.authority import SERVERS, Authority
from certs.cluster import Cluster
from certs.errors import CertificateError, ConfigError
from certs.files import load_certificate
from certs.identity import (
    Identity,
    authority_directory,
    ensure_identity,
    hosts_of,
    identity_directory,
    publish_crl,
)
from certs.roles import ENROLMENT_NAME, EXPORTER_NAME, SUPERLINK_NAME, Role, checked_name, spiffe_id
from certs.take import Copy, merged

Holder = tuple[Role, str]

# Every federation has these three. A site, and the SuperExec beside it, become members by invitation.
_SERVERS: tuple[Holder, ...] = (
    (Role.SUPERLINK, SUPERLINK_NAME),
    (Role.ENROLMENT, ENROLMENT_NAME),
    (Role.EXPORTER, EXPORTER_NAME),
)
# Where a server's own health is asked.
_LOCAL = ("localhost", "127.0.0.1")


def store(cluster: Cluster, name: str, new: Copy, namespace: str | None = None) -> str:
    """Let a Secret hold ``new`` unless what it holds is newer; return ``stored`` or ``kept``.

    Raises ``CertificateError`` when it holds something else than a copy of the same identity.
    """
    where = Path(f"the Secret {name}")

    def decide(there: dict[str, bytes] | None) -> dict[str, bytes] | None:
        if there is None:
            return new.files
        held = Copy.of(where, there)
        held.require_holder(new.peer)
        held.require_known(new.identity.authorities())
        files = merged(held, new)
        return None if files == there else files

    return "stored" if cluster.store(name, decide, namespace) else "kept"


def store_directory(cluster: Cluster, directory: Path, name: str, namespace: str | None) -> str:
    """Do the same with the identity in a directory, which has to be current."""
    Identity.load(directory, *Role)
    copy = Copy.read(directory)
    if copy is None:  # removed since
        raise CertificateError(f"{directory} holds no identity")
    return store(cluster, name, copy, namespace)


def ensure(
    cluster: Cluster,
    pki: Path,
    federation: str,
    hosts: Mapping[Role, Sequence[str]],
    secrets: Mapping[Holder, str],
) -> Iterator[tuple[str, str]]:
    """Ensure the authority, an identity of each server and of each holder of a Secret, and the Secrets.

    ``hosts`` are where each server is reached, beside its own machine; ``secrets`` names the Secret of each holder.
    Yields what became of each identity and Secret. Raises ``CertificateError`` before anything is made or changed when
    a Secret is of another federation, or of an authority that this directory does not hold.
    """
    _require_sound(hosts, secrets)
    _require_one_federation(cluster, pki, federation, secrets)
    authority = Authority.init(authority_directory(pki), federation)
    # A federation whose members never change would otherwise let its list go stale.
    authority.renew_crl()
    for role, name in dict.fromkeys((*_SERVERS, *secrets)):
        directory = identity_directory(pki, role, name)
        names = list(dict.fromkeys((*_LOCAL, *hosts.get(role, ())))) if role in SERVERS else []
        if _lives_elsewhere(authority, directory, role, name, names):
            yield "kept", f"{directory}: while the authority is replaced, its holder renews it"
        else:
            yield ensure_identity(authority, directory, role, name, names), str(directory)
    publish_crl(pki, authority)
    for (role, name), secret in secrets.items():
        copy = Copy.read(identity_directory(pki, role, name))
        if copy is None:
            yield "kept", f"Secret {secret}: this directory has no identity of {role} {name!r}"
        else:
            yield store(cluster, secret, copy), f"Secret {secret}"


def _lives_elsewhere(
    authority: Authority, directory: Path, role: Role, name: str, hosts: Sequence[str]
) -> bool:
    """Whether a certificate issued now would make ``rotation.switch`` believe what is not so.

    Between ``begin`` and ``switch`` an authority waits until the holders themselves trust the next one. A copy made
    here says nothing about the process that runs with another.
    """
    if role is Role.ENROLMENT or rotation.status(authority).phase is not rotation.Phase.BEGUN:
        return False
    path, now = directory / "tls.crt", datetime.now(UTC)
    if path.exists() and not set(hosts_of(load_certificate(path))) >= set(hosts):
        return False
    return any(
        (line.role, line.name) == (role, name) and line.state(now) == "valid"
        for line in authority.issued()
    )


def _require_sound(hosts: Mapping[Role, Sequence[str]], secrets: Mapping[Holder, str]) -> None:
    servers = [role for role, _ in _SERVERS]
    for role in hosts:
        if role not in servers:
            raise ConfigError(f"--host {role}=...: name one of {', '.join(servers)}")
    for role, name in secrets:
        checked_name(name)
        if role is Role.SITE or (role, name != SUPERLINK_NAME) == (Role.SUPEREXEC, True):
            raise ConfigError(
                f"--secret {role}/{name}: sites and their SuperExecs become members by invitation "
                "('vlafleet site enrol')"
            )
        if role is Role.ENROLMENT:
            raise ConfigError(
                f"--secret {role}/{name}: the enrolment service works in the PKI directory itself"
            )
    if len(set(secrets.values())) != len(secrets):
        raise ConfigError("--secret: every holder has a Secret of its own")


def _require_one_federation(
    cluster: Cluster, pki: Path, federation: str, secrets: Mapping[Holder, str]
) -> None:
    """Raise ``CertificateError`` unless what lies in the cluster came from this directory's authority."""
    directory = authority_directory(pki)
    found = {
        holder: files
        for holder, secret in secrets.items()
        if (files := cluster.read(secret)) is not None
    }
    if not (directory / "ca.crt").exists():
        if found:
            names = ", ".join(secrets[holder] for holder in found)
            raise CertificateError(
                f"{directory} holds no authority, and the cluster holds identities of one (Secrets {names}): if the "
                "volume was lost, restore it from its backup; to make the federation anew, with every site invited "
                "again, delete these Secrets first"
            )
        return
    authority = Authority.init(directory, federation)
    for (role, name), files in found.items():
        copy = Copy.of(Path(f"the Secret {secrets[role, name]}"), files)
        if copy.peer.uri != spiffe_id(federation, role, name):
            raise CertificateError(
                f"{copy.where} holds the identity {copy.peer.uri}, not one of {role} {name!r} of {federation!r}; "
                "nothing was changed. Name another Secret, or remove this one"
            )
        copy.require_known(authority.certificates())
