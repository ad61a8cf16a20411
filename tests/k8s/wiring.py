"""Which pods reach each other, and the Docker networks that make it so: one for each pair that the policies allow."""

import ipaddress
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.k8s.charts import Manifest
from tests.k8s.engine import Engine
from tests.k8s.objects import namespace_of, of_kind, pod_templates, selects
from tests.k8s.policies import Network, Peer, outside

# By this annotation, external-dns's, a Service gets its name outside of the cluster.
_HOSTNAME = "external-dns.alpha.kubernetes.io/hostname"
_DNS = Peer("kube-dns", "kube-system", {"k8s-app": "kube-dns"}, {"dns": (53, "UDP")})


@dataclass(eq=False)
class Cluster:
    """A cluster of Kubernetes: its objects, and the address by which it and the others know each other.

    From that address its pods reach what is outside, and at it answer its Services of type LoadBalancer.
    """

    name: str
    address: str
    objects: dict[tuple[str, str, str], Manifest] = field(default_factory=dict)

    def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """Return an object; None where it is not there."""
        return self.objects.get((kind, namespace, name))

    def apply(self, manifests: list[Manifest], namespace: str) -> None:
        """Take objects in, as ``helm install --namespace`` does."""
        for manifest in manifests:
            metadata = manifest["metadata"]
            metadata.setdefault("namespace", namespace)
            key = manifest["kind"], metadata["namespace"], metadata["name"]
            self.objects[key] = manifest

    @property
    def network(self) -> Network:
        """What the cluster's NetworkPolicies allow."""
        return Network(self.objects.values())

    def services(self, pod: "Pod") -> list[Manifest]:
        """Return the Services that lead to a pod."""
        return [
            service
            for service in of_kind(list(self.objects.values()), "Service")
            if namespace_of(service) == pod.namespace
            and selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]


@dataclass(eq=False)
class Pod:
    """A pod of a cluster, running or to be run."""

    cluster: Cluster
    name: str
    namespace: str
    labels: dict[str, str]
    spec: dict[str, Any]
    # What its containers that ended printed, by their names.
    logs: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.cluster.name}-{self.namespace}-{self.name}"

    @property
    def all_containers(self) -> list[dict[str, Any]]:
        """The containers, those that run first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @cached_property
    def fields(self) -> dict[str, str]:
        """What the downward API tells of it."""
        return {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "metadata.uid": str(uuid.uuid4()),
        }

    @property
    def ports(self) -> dict[str, int]:
        """The ports that its containers open, by name."""
        return {
            port.get("name", str(port["containerPort"])): port["containerPort"]
            for container in self.all_containers
            for port in container.get("ports", [])
        }

    @property
    def peer(self) -> Peer:
        """The pod as the policies know it."""
        ports = {name: (number, "TCP") for name, number in self.ports.items()}
        return Peer(str(self), self.namespace, self.labels, ports)

    @property
    def resolves(self) -> bool:
        """Whether it may ask the cluster's DNS, and is told to."""
        return self.spec.get("dnsPolicy", "ClusterFirst") != "None" and (
            self.cluster.network.reaches(self.peer, _DNS, 53, "UDP")
        )


def workload_pods(cluster: Cluster, manifests: list[Manifest]) -> Iterator[Pod]:
    """Yield the pods of workloads that run on: one a StatefulSet."""
    for template in pod_templates(of_kind(manifests, "StatefulSet")):
        yield Pod(cluster, f"{template.name}-0", template.namespace, template.labels, template.spec)


def reaches(source: Pod, target: Pod) -> bool:
    """Tell whether a pod gets a connection to some port of another's."""
    if source.cluster is target.cluster:
        network = source.cluster.network
        return any(
            network.reaches(source.peer, target.peer, port) for port in target.ports.values()
        )
    return any(
        source.cluster.network.reaches(source.peer, outside(target.cluster.address), port)
        and target.cluster.network.reaches(outside(source.cluster.address), target.peer, port)
        for port in _published(target)
    )


def _published(pod: Pod) -> list[int]:
    """Return the ports at which a pod answers outside of its cluster."""
    return [
        port["port"]
        for service in pod.cluster.services(pod)
        if service["spec"].get("type") == "LoadBalancer"
        for port in service["spec"]["ports"]
    ]


def _aliases(pod: Pod, asker: Pod) -> list[str]:
    """Return the names by which one pod finds another."""
    found = []
    for service in pod.cluster.services(pod):
        name = service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            number = pod.ports.get(target) if isinstance(target, str) else target
            # Nothing here translates ports.
            assert number == port["port"], f"Service {name} leads {port['port']} to {target}"
        if hostname := service["metadata"].get("annotations", {}).get(_HOSTNAME):
            found.append(hostname)
        if pod.cluster is asker.cluster:
            long = f"{name}.{pod.namespace}"
            found += [long, f"{long}.svc", f"{long}.svc.cluster.local"]
            found += [name] if pod.namespace == asker.namespace else []
    return found


@dataclass
class Link:
    """The network of a pair of pods, and each one's address in it."""

    network: str
    pods: tuple[Pod, Pod]
    subnet: ipaddress.IPv4Network

    def address(self, pod: Pod) -> str:
        """Return a pod's address; the first after the gateway's is that of the pod that was there first."""
        return str(self.subnet[2 + self.pods.index(pod)])

    def endpoint(self, pod: Pod) -> tuple[str, list[str]]:
        """Return a pod's address, and its names for the other."""
        (other,) = (one for one in self.pods if one is not pod)
        return self.address(pod), _aliases(pod, other)


class Wiring:
    """The links among pods, made when the first of a pair starts."""

    def __init__(self, engine: Engine, block: ipaddress.IPv4Network) -> None:
        self._engine = engine
        self._block = block
        self._subnets = block.subnets(new_prefix=29)
        self._links: dict[tuple[Pod, Pod], Link] = {}
        # Those that are to run or run, in the order in which they were heard of.
        self.pods: list[Pod] = []

    def first_addresses(self) -> list[str]:
        """Return every address that the first pod of some pair may have."""
        return [str(subnet[2]) for subnet in self._block.subnets(new_prefix=29)]

    def links(self, pod: Pod) -> Mapping[Pod, Link]:
        """Return the links of a pod by the pod at the other end."""
        return {
            other: self._link(*sorted((pod, other), key=self.pods.index))
            for other in self.pods
            if other is not pod and (reaches(pod, other) or reaches(other, pod))
        }

    def _link(self, first: Pod, second: Pod) -> Link:
        key = first, second
        if key not in self._links:
            name = self._engine.name(f"link-{len(self._links)}")
            link = self._links[key] = Link(name, key, next(self._subnets))
            # Without an address of this machine on the bridge, and without a route out (see compose.yaml).
            self._engine(
                *("network", "create", "--internal", "--subnet", str(link.subnet)),
                *("--opt", "com.docker.network.bridge.inhibit_ipv4=true"),
                *(*self._engine.label, name),
            )
        return self._links[key]
