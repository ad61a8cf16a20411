"""The list of sites: what the authority, Flower's register, the invitations and the sites themselves know of each."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from certs.index import Issued
from certs.roles import Role
from superlink.control import Node
from superlink.datasets import Datasets


def roster(
    issued: Sequence[Issued],
    nodes: Sequence[Node],
    invitations: Iterable[Mapping[str, str | int]],
    datasets: Datasets,
) -> list[dict[str, Any]]:
    """Return every site by name.

    ``state`` is ``invited`` (may come in, or has a certificate and no SuperNode), ``registered`` (was never online),
    ``online``, ``offline``, ``expired`` (its last certificate is) or ``revoked``.
    """
    now = datetime.now(UTC)
    # The last of each name: what was issued later replaces what came before.
    certificates = {line.name: line for line in issued if line.role is Role.SITE}
    alive = {node.name: node for node in nodes if node.status != "unregistered"}
    invited = {str(entry["site"]) for entry in invitations if entry["state"] == "open"}
    sites = []
    for name in sorted({*certificates, *alive, *invited}):
        certificate, node = certificates.get(name), alive.get(name)
        dataset = datasets.of(name)
        sites.append(
            {
                "site": name,
                "state": _state(certificate, node, now, invited=name in invited),
                "last_heartbeat": node.last_heartbeat if node else None,
                "not_after": int(certificate.not_after.timestamp()) if certificate else None,
                "episodes": dataset.get("episodes"),
                "frames": dataset.get("frames"),
                "bytes": dataset.get("bytes"),
            }
        )
    return sites


def _state(certificate: Issued | None, node: Node | None, now: datetime, *, invited: bool) -> str:
    ended = certificate.state(now) if certificate else "none"
    if ended == "revoked" and not invited:
        return "revoked"
    if node is None:
        return "expired" if ended == "expired" and not invited else "invited"
    # Flower keeps a SuperNode whose certificate has run out; it comes online no more.
    return "expired" if ended in {"expired", "none"} else str(node.status)
