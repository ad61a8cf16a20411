"""Who may reach whom under NetworkPolicies, as networking.k8s.io/v1 means them.

A connection needs both ends: a policy's egress lets it out of its source, another's ingress lets it into its target. A
pod that no policy selects for a direction is open in it. Ports are the pods' own, as a policy sees them: after the
Service's translation. What belongs to one connection (answers) needs no rule, and a pod reaches itself.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.k8s.charts import Manifest
from tests.k8s.objects import namespace_of, of_kind, pod_templates, selects

Direction = Literal["Ingress", "Egress"]
NAMESPACE_NAME = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or, without a namespace, an address outside the cluster.

    Plugins differ in whether an ipBlock takes a pod's address. A pod without an address is one that no ipBlock takes,
    with an address one that they do: ask both, to be right under every plugin.
    """

    name: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    # Named ports: (number, protocol) by name.
    ports: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    address: str | None = None


def outside(address: str) -> Peer:
    """Return an address outside the cluster."""
    return Peer(address, address=address)


def pod_peers(manifests: list[Manifest]) -> list[Peer]:
    """Return the pods that these objects make, one a workload, named after it."""
    return [
        Peer(
            template.name,
            template.namespace,
            template.labels,
            {
                port["name"]: (port["containerPort"], port.get("protocol", "TCP"))
                for container in template.all_containers
                for port in container.get("ports", [])
                if "name" in port
            },
        )
        for template in pod_templates(manifests)
    ]


class Network:
    """The NetworkPolicies among some objects, and the labels of the namespaces they are about."""

    def __init__(
        self,
        manifests: Iterable[Manifest],
        namespaces: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._policies = of_kind(list(manifests), "NetworkPolicy")
        self._namespaces = namespaces or {}

    def reaches(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
        """Tell whether a connection from one peer to a port of another gets through."""
        if source == target:
            return True
        return self._lets("Egress", source, target, target, port, protocol) and self._lets(
            "Ingress", target, source, target, port, protocol
        )

    def isolated(self, pod: Peer, direction: Direction) -> bool:
        """Tell whether some policy selects a pod for a direction: only then is anything refused."""
        return bool(self._selecting(pod, direction))

    def _selecting(self, pod: Peer, direction: Direction) -> list[Manifest]:
        """Return the policies that select a pod for a direction; none select what is outside the cluster."""
        return [
            policy
            for policy in self._policies
            if pod.namespace == namespace_of(policy)
            and direction in _types(policy["spec"])
            and selects(policy["spec"].get("podSelector") or {}, dict(pod.labels))
        ]

    def _lets(
        self, direction: Direction, own: Peer, other: Peer, target: Peer, port: int, protocol: str
    ) -> bool:
        """Tell whether the policies of one end let a connection through; they add up."""
        policies = self._selecting(own, direction)
        peers = "to" if direction == "Egress" else "from"
        return not policies or any(
            self._is_one_of(other, rule.get(peers) or [], namespace_of(policy))
            and _has_port(rule.get("ports") or [], target, port, protocol)
            for policy in policies
            for rule in policy["spec"].get(direction.lower()) or []
        )

    def _is_one_of(self, peer: Peer, wanted: list[dict[str, Any]], namespace: str) -> bool:
        """Tell whether a rule's ``from`` or ``to`` takes a peer; an empty one takes everyone."""
        return not wanted or any(self._is(peer, one, namespace) for one in wanted)

    def _is(self, peer: Peer, wanted: dict[str, Any], namespace: str) -> bool:
        block, pods, spaces = (
            wanted.get(key) for key in ("ipBlock", "podSelector", "namespaceSelector")
        )
        if set(wanted) - {"ipBlock", "podSelector", "namespaceSelector"} or (
            (block is None) == (pods is None and spaces is None)
        ):
            raise ValueError(
                f"a peer is an ipBlock, or a podSelector and a namespaceSelector: {wanted}"
            )
        if block is not None:
            return peer.address is not None and _in_block(peer.address, block)
        if not peer.namespace:
            return False
        here = peer.namespace == namespace
        if spaces is not None:
            labels = {NAMESPACE_NAME: peer.namespace, **self._namespaces.get(peer.namespace, {})}
            here = selects(spaces, labels)
        return here and selects(pods or {}, dict(peer.labels))


def _types(spec: dict[str, Any]) -> list[str]:
    """Return a policy's directions; one that names none is about egress only if it has a rule for it."""
    return spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]


def _in_block(address: str, block: dict[str, Any]) -> bool:
    """Tell whether an ipBlock takes an address."""
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(
        ip in ipaddress.ip_network(hole) for hole in block.get("except") or []
    )


def _has_port(wanted: list[dict[str, Any]], target: Peer, port: int, protocol: str) -> bool:
    """Tell whether a rule's ports take a port of the target; none named takes all."""
    return not wanted or any(_is_port(one, target, port, protocol) for one in wanted)


def _is_port(wanted: dict[str, Any], target: Peer, port: int, protocol: str) -> bool:
    first = wanted.get("port")
    if isinstance(first, str):
        # A name is the target pod's, which may know none such.
        return target.ports.get(first) == (port, protocol)
    if wanted.get("protocol", "TCP") != protocol:
        return False
    return first is None or first <= port <= wanted.get("endPort", first)
