"""What must hold between the objects that the charts make: what one names, another is. A sentence for each fault."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.k8s.charts import Manifest
from tests.k8s.objects import Template, namespace_of, of_kind, pod_templates, selects
from tests.k8s.pod_checks import Check, every_container
from tests.k8s.renders import Rendered, strings

HOSTNAME = "kubernetes.io/hostname"
# What the API server puts into every namespace.
GIVEN = {("ConfigMap", "kube-root-ca.crt"), ("ServiceAccount", "default")}
LABELS = {
    "helm.sh/chart",
    *(
        f"app.kubernetes.io/{name}"
        for name in ("name", "instance", "component", "version", "part-of", "managed-by")
    ),
}
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def name_of(manifest: Manifest) -> str:
    """Return an object's name."""
    name: str = manifest["metadata"]["name"]
    return name


def made_secrets(rendered: Rendered) -> set[str]:
    """Return the Secrets that the pods themselves make, as their commands are told, and that cert-manager makes."""
    names = {
        certificate["spec"]["secretName"]
        for certificate in of_kind(rendered.manifests, "Certificate")
    }
    for _, container in every_container(rendered):
        arguments = container.get("args", [])
        for option, value in itertools.pairwise(arguments):
            if option in ("--secret", "--superexec-secret"):
                names.add(value.rpartition("=")[2])
    return names


def named(template: Template) -> Iterator[tuple[str, str]]:
    """Yield the objects that a pod cannot start without, as (kind, name)."""
    spec = template.spec
    yield "ServiceAccount", spec.get("serviceAccountName", "default")
    for secret in spec.get("imagePullSecrets", []):
        yield "Secret", secret["name"]
    for volume in spec.get("volumes", []):
        for source in [volume, *volume.get("projected", {}).get("sources", [])]:
            yield from _sources(source)
    for container in template.all_containers:
        for variable in container.get("env", []):
            origin = variable.get("valueFrom", {})
            if "secretKeyRef" in origin:
                yield "Secret", origin["secretKeyRef"]["name"]
            if "configMapKeyRef" in origin:
                yield "ConfigMap", origin["configMapKeyRef"]["name"]
        if "envFrom" in container:
            raise ValueError(f"{template}: envFrom hides what a container is told")


def _sources(source: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "secret" in source:
        secret = source["secret"]
        yield "Secret", secret.get("secretName") or secret["name"]
    if "configMap" in source:
        yield "ConfigMap", source["configMap"]["name"]
    if "persistentVolumeClaim" in source:
        yield "PersistentVolumeClaim", source["persistentVolumeClaim"]["claimName"]


def references(rendered: Rendered) -> Iterator[str]:
    """What a pod names (Secrets, claims, …) is rendered in its namespace, made by a pod, or named in the values."""
    there = {
        (namespace_of(manifest), manifest["kind"], name_of(manifest))
        for manifest in rendered.manifests
    }
    from_values, made = set(strings(rendered.values)), made_secrets(rendered)
    for pod in pod_templates(rendered.manifests):
        for kind, name in named(pod):
            if (pod.namespace, kind, name) in there or (kind, name) in GIVEN:
                continue
            task = kind == "Secret" and name.startswith("flwr-taskexecutor-")
            if name in from_values or (kind == "Secret" and name in made) or task:
                continue
            yield f"{pod} names {kind} {name}, which is nowhere"
    for monitor in of_kind(rendered.manifests, "ServiceMonitor"):
        for key, value in _secret_keys(monitor["spec"]):
            if value not in made and value not in from_values:
                yield f"ServiceMonitor {name_of(monitor)}: {key} names Secret {value}"


def _secret_keys(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the Secrets that a monitor's tlsConfig names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secret", "keySecret") and isinstance(inner, dict):
                yield key, inner["name"]
            else:
                yield from _secret_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _secret_keys(inner)


def mounts(rendered: Rendered) -> Iterator[str]:
    """Every mount has its volume and every volume a mount; nothing is listed twice (server-side apply refuses that)."""
    for pod in pod_templates(rendered.manifests):
        volumes = [volume["name"] for volume in pod.spec.get("volumes", [])]
        used = set()
        yield from (f"{pod}: volume {twice} twice" for twice in _twice(volumes))
        yield from (
            f"{pod}: container {twice} twice"
            for twice in _twice([container["name"] for container in pod.all_containers])
        )
        for container in pod.all_containers:
            who = f"{pod} {container['name']}"
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
            yield from (f"{who}: mount {twice} twice" for twice in _twice(paths))
            variables = [variable["name"] for variable in container.get("env", [])]
            yield from (f"{who}: variable {twice} twice" for twice in _twice(variables))
            ports = [
                (port["containerPort"], port.get("protocol", "TCP"))
                for port in container.get("ports", [])
            ]
            yield from (f"{who}: port {twice} twice" for twice in _twice(ports))
            for mount in container.get("volumeMounts", []):
                used.add(mount["name"])
                if mount["name"] not in volumes:
                    yield f"{who} mounts {mount['name']}, which is no volume"
        yield from (f"{pod}: nobody mounts {name}" for name in sorted(set(volumes) - used))


def _twice(values: list[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def selectors(rendered: Rendered) -> Iterator[str]:
    """A workload's selector takes its own pods and no other's; Services, budgets, policies and monitors find theirs."""
    pods = list(pod_templates(rendered.manifests))

    def taken(selector: dict[str, Any], namespace: str) -> list[Template]:
        return [pod for pod in pods if pod.namespace == namespace and selects(selector, pod.labels)]

    for manifest in rendered.manifests:
        kind, namespace = manifest["kind"], namespace_of(manifest)
        who = f"{kind} {name_of(manifest)}"
        spec = manifest.get("spec") or {}
        if kind in ("StatefulSet", "Deployment", "PodDisruptionBudget"):
            found = {str(pod) for pod in taken(spec["selector"], namespace)}
            own = {f"{kind} {namespace}/{name_of(manifest)}"}
            if len(found) != 1 or (kind != "PodDisruptionBudget" and found != own):
                yield f"{who} selects {sorted(found)}"
        elif kind == "Service":
            found_pods = taken({"matchLabels": spec["selector"]}, namespace)
            if len(found_pods) != 1:
                yield f"{who} selects {sorted(map(str, found_pods))}"
            for pod in found_pods:
                yield from (f"{who}: {wrong}" for wrong in _ports(spec, pod))
        elif kind == "NetworkPolicy":
            if not taken(spec["podSelector"], namespace):
                yield f"{who} selects no pod"
        elif kind in ("ServiceMonitor", "PodMonitor"):
            yield from (f"{who}: {wrong}" for wrong in _monitor(manifest, rendered.manifests, pods))


def _ports(spec: dict[str, Any], pod: Template) -> Iterator[str]:
    """Yield the ports of a Service that its pod does not have."""
    ports = [port for container in pod.spec["containers"] for port in container.get("ports", [])]
    for port in spec["ports"]:
        target = port.get("targetPort", port["port"])
        if target not in {
            known for one in ports for known in (one.get("name"), one["containerPort"])
        }:
            yield f"{pod} has no port {target}"


def _monitor(manifest: Manifest, manifests: list[Manifest], pods: list[Template]) -> Iterator[str]:
    """Yield what a monitor selects or names that is not there."""
    spec, namespace = manifest["spec"], namespace_of(manifest)
    if manifest["kind"] == "ServiceMonitor":
        found = [
            {port["name"] for port in service["spec"]["ports"]}
            for service in of_kind(manifests, "Service")
            if namespace_of(service) == namespace
            and selects(spec["selector"], service["metadata"].get("labels", {}))
        ]
        endpoints = spec["endpoints"]
    else:
        found = [
            {port.get("name") for one in pod.spec["containers"] for port in one.get("ports", [])}
            for pod in pods
            if pod.namespace == namespace and selects(spec["selector"], pod.labels)
        ]
        endpoints = spec["podMetricsEndpoints"]
    if len(found) != 1:
        yield f"selects {len(found)}"
    for ports in found:
        yield from (
            f"there is no port {one['port']}" for one in endpoints if one["port"] not in ports
        )


def claims(rendered: Rendered) -> Iterator[str]:
    """A claim outlives the release and is one pod's; another pod that mounts it must land on the same node."""
    users: dict[tuple[str, str], list[Template]] = {}
    for pod in pod_templates(rendered.manifests):
        for kind, name in set(named(pod)):
            if kind == "PersistentVolumeClaim":
                users.setdefault((pod.namespace, name), []).append(pod)
    for claim in of_kind(rendered.manifests, "PersistentVolumeClaim"):
        who, metadata = f"claim {name_of(claim)}", claim["metadata"]
        if metadata.get("annotations", {}).get("helm.sh/resource-policy") != "keep":
            yield f"{who} goes with the release"
        mounting = users.get((namespace_of(claim), name_of(claim)), [])
        if not mounting:
            yield f"{who} is nobody's"
        modes = claim["spec"]["accessModes"]
        if len(mounting) > 1 and modes != ["ReadWriteMany"]:
            apart = [pod for pod in mounting if not _lands_beside(pod, mounting)]
            if len(apart) > 1:
                yield f"{who} ({modes}) is of {', '.join(map(str, apart))}, which may be on two nodes"
    for workload in of_kind(rendered.manifests, "StatefulSet"):
        if workload["spec"].get("replicas", 1) != 1 or "volumeClaimTemplates" in workload["spec"]:
            yield f"StatefulSet {name_of(workload)} is not one pod with claims of their own"


def _lands_beside(pod: Template, others: list[Template]) -> bool:
    """Tell whether a pod must be on the node of one of the others."""
    affinity = (pod.spec.get("affinity") or {}).get("podAffinity", {})
    return any(
        term["topologyKey"] == HOSTNAME
        and other != pod
        and other.namespace in term.get("namespaces", [pod.namespace])
        and selects(term["labelSelector"], other.labels)
        for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        for other in others
    )


def names(rendered: Rendered) -> Iterator[str]:
    """Names are DNS labels, ports' names are short, no object is there twice, and each says whose it is."""
    keys = [(m["kind"], namespace_of(m), name_of(m)) for m in rendered.manifests]
    yield from (f"{twice} is there twice" for twice in _twice(keys))
    for manifest in rendered.manifests:
        who, labels = (
            f"{manifest['kind']} {name_of(manifest)}",
            manifest["metadata"].get("labels", {}),
        )
        if not DNS_LABEL.fullmatch(name_of(manifest)):
            yield f"{who} is no DNS label"
        # A task's pod is Flower's, which labels it.
        if manifest["kind"] != "Pod" and (missing := LABELS - set(labels)):
            yield f"{who} lacks the labels {sorted(missing)}"
        for value in labels.values():
            if not re.fullmatch(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", value):
                yield f"{who}: {value} is no label"
    for workload in of_kind(rendered.manifests, "StatefulSet"):
        # The pod is NAME-0, and controller-revision-hash is NAME and ten more characters, at most 63.
        if len(name_of(workload)) > 52:
            yield f"StatefulSet {name_of(workload)} has too long a name for its pods' labels"
    for pod, container in every_container(rendered):
        for port in container.get("ports", []):
            if len(port.get("name", "")) > 15:
                yield f"{pod} {container['name']}: port name {port['name']} is over 15 characters"


def addresses(rendered: Rendered) -> Iterator[str]:
    """What a container is told to talk to in the release is a Service with that port; each $(VARIABLE) has a value."""
    ports = {
        (namespace_of(service), name_of(service)): {
            port["port"] for port in service["spec"]["ports"]
        }
        for service in of_kind(rendered.manifests, "Service")
    }
    for pod, container in every_container(rendered):
        who, variables = f"{pod} {container['name']}", container.get("env", [])
        known = {one["name"] for one in variables}
        told = [*container.get("args", []), *(one.get("value", "") for one in variables)]
        for text in told:
            for variable in re.findall(r"\$\(([A-Z0-9_]+)\)", text):
                service = variable.removesuffix("_SERVICE_HOST").replace("_", "-").lower()
                port = text.rpartition(":")[2]
                here = ports.get((pod.namespace, service), set())
                if variable not in known and (not port.isdigit() or int(port) not in here):
                    yield f"{who}: {text} is no Service of its namespace"
            match = re.fullmatch(r"([a-z0-9-]+)(?:\.([a-z0-9-]+)(?:\.svc)?)?:(\d+)", text)
            if match and match[0] not in set(strings(rendered.values)):
                name, namespace, port = match.groups()
                if name != "localhost" and int(port) not in ports.get(
                    (namespace or pod.namespace, name), set()
                ):
                    yield f"{who}: {text} is no Service"


CHECKS: tuple[Check, ...] = (references, mounts, selectors, claims, names, addresses)
