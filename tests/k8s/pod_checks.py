"""What must hold of every pod that the charts make. Each check yields a sentence for each thing that is wrong."""

import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from tests.k8s.objects import Template, of_kind, pod_templates
from tests.k8s.renders import Rendered

Container = dict[str, Any]
Check = Callable[[Rendered], Iterator[str]]

# The images' own user.
UID = 10001
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "fsGroup": UID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
# All that a pod may mount; hostPath is for the site's recordings.
VOLUMES = {
    *("persistentVolumeClaim", "emptyDir", "secret", "configMap", "projected", "hostPath"),
}
# Their own ports answer, so that only they can be told dead by a probe; of the others the probe tells whether they are
# in contact with another process, whose outage must not restart them.
SERVERS = {"superlink", "enrolment", "exporter"}
CLIENTS = {"supernode", "superexec"}
# The image of each command; a script has none.
IMAGES = {
    **dict.fromkeys(("superlink", "enrolment", "exporter"), "vlafleet-superlink"),
    **dict.fromkeys(("supernode", "site"), "vlafleet-supernode"),
    "superexec": "vlafleet-app",
}
IMAGE = re.compile(
    r"(?P<repository>([a-z0-9.-]+(:\d+)?/)?[a-z0-9._/-]+)(:(?P<tag>[\w.-]+)|@sha256:[0-9a-f]{64})"
)
_UNITS = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
    "m": Decimal("0.001"),
}


def every_container(rendered: Rendered) -> Iterator[tuple[Template, Container]]:
    """Yield each container with its pod, those that run first included."""
    for pod in pod_templates(rendered.manifests):
        for container in pod.all_containers:
            yield pod, container


def quantity(value: str | float) -> Decimal:
    """Return a quantity of Kubernetes (250m, 2Gi, 3) as a number."""
    text = str(value)
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return Decimal(text.removesuffix(unit)) * factor
    return Decimal(text)


def command(container: Container) -> str:
    """Return which command of vlafleet a container runs, or an empty string for a script."""
    arguments = container.get("args") or [""]
    return "" if "command" in container else arguments[0]


def option(container: Container, name: str) -> str | None:
    """Return an option's value in a container's arguments."""
    arguments = container.get("args", [])
    return arguments[arguments.index(name) + 1] if name in arguments else None


def hardened(rendered: Rendered) -> Iterator[str]:
    """Non-root, no privilege, nothing of the node: the pod's and each container's security context, exactly."""
    for pod in pod_templates(rendered.manifests):
        if pod.spec.get("securityContext") != POD_SECURITY:
            yield f"{pod}: securityContext is {pod.spec.get('securityContext')}"
        if own := {"hostNetwork", "hostPID", "hostIPC", "ephemeralContainers"} & set(pod.spec):
            yield f"{pod} sets {sorted(own)}"
        for volume in pod.spec.get("volumes", []):
            if unknown := set(volume) - VOLUMES - {"name"}:
                yield f"{pod}: volume {volume['name']} is a {sorted(unknown)}"
            if "hostPath" in volume and volume["hostPath"]["type"] not in ("Directory", "File"):
                yield f"{pod}: volume {volume['name']} makes a directory on the node"
    for pod, container in every_container(rendered):
        if container.get("securityContext") != CONTAINER_SECURITY:
            yield f"{pod} {container['name']}: {container.get('securityContext')}"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{pod} {container['name']} takes a port of the node"


def read_only_outside(rendered: Rendered) -> Iterator[str]:
    """What comes from outside of the pod (Secrets, ConfigMaps, recordings) is mounted read-only."""
    for pod in pod_templates(rendered.manifests):
        outside = {
            volume["name"]
            for volume in pod.spec.get("volumes", [])
            if set(volume) & {"secret", "configMap", "projected", "hostPath"}
        }
        for container in pod.all_containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] in outside and not mount.get("readOnly"):
                    yield f"{pod} {container['name']} may write to {mount['mountPath']}"


def writable(rendered: Rendered) -> Iterator[str]:
    """A read-only root needs /tmp and the home as emptyDirs, each of a bounded size."""
    for pod in pod_templates(rendered.manifests):
        empty = {
            volume["name"]: volume["emptyDir"]
            for volume in pod.spec.get("volumes", [])
            if "emptyDir" in volume
        }
        for name, volume in empty.items():
            if "sizeLimit" not in (volume or {}):
                yield f"{pod}: emptyDir {name} has no sizeLimit"
        for container in pod.all_containers:
            mounts = {
                mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])
            }
            for path in ("/tmp", "/home/vlafleet"):
                if mounts.get(path) not in empty:
                    yield f"{pod} {container['name']} has no emptyDir at {path}"


def resources(rendered: Rendered) -> Iterator[str]:
    """Each container asks for CPU and memory and is bounded in memory; no request is above its limit."""
    for pod, container in every_container(rendered):
        given = container.get("resources") or {}
        requests, limits = given.get("requests") or {}, given.get("limits") or {}
        who = f"{pod} {container['name']}"
        for kind, wanted in (
            ("request", {"cpu", "memory"} - set(requests)),
            ("limit", {"memory"} - set(limits)),
        ):
            for name in sorted(wanted):
                yield f"{who} has no {kind} of {name}"
        for name, limit in limits.items():
            if quantity(requests.get(name, limit)) > quantity(limit):
                yield f"{who} asks for more {name} than its limit"
        # Extended resources (GPUs) are whole, and what is asked for is what is given.
        for name in {name for name in (*requests, *limits) if "/" in name}:
            if requests.get(name, limits.get(name)) != limits.get(name):
                yield f"{who}: {name} is requested and limited differently"


def scratch_fits(rendered: Rendered) -> Iterator[str]:
    """The kubelet evicts a pod above its ephemeral-storage limit: its emptyDirs on disk must fit into it."""
    for pod in pod_templates(rendered.manifests):
        # Containers run beside each other, those that run first do so one by one.
        limits = [
            (container.get("resources") or {}).get("limits", {}).get("ephemeral-storage")
            for container in pod.spec["containers"]
        ]
        if any(limit is None for limit in limits):
            continue
        together = sum(
            quantity((volume["emptyDir"] or {}).get("sizeLimit", 0))
            for volume in pod.spec.get("volumes", [])
            if "emptyDir" in volume and (volume["emptyDir"] or {}).get("medium") != "Memory"
        )
        if together > sum(map(quantity, limits)):
            yield f"{pod}: emptyDirs of {together} bytes, ephemeral-storage limits below that"


def probes(rendered: Rendered) -> Iterator[str]:
    """A server has all three probes, a client of another process only one of readiness; all ask over mutual TLS."""
    for pod in pod_templates(rendered.manifests):
        for container in pod.spec.get("initContainers", []):
            if any(kind in container for kind in _PROBES):
                yield f"{pod} {container['name']} runs first and has a probe"
        for container in pod.spec["containers"]:
            who = f"{pod} {container['name']}"
            has = {kind for kind in _PROBES if kind in container}
            does = command(container)
            if pod.kind in ("Job", "CronJob", "Pod"):
                wanted: set[str] = set()
            elif does in SERVERS:
                wanted = set(_PROBES)
            elif does in CLIENTS:
                wanted = {"readinessProbe"}
            else:
                yield f"{who} runs {container.get('args')} for ever"
                continue
            if has != wanted:
                yield f"{who} has {sorted(has)}, not {sorted(wanted)}"
            for kind in sorted(has):
                yield from (f"{who} {kind}: {wrong}" for wrong in _probe(container, kind))


_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def _probe(container: Container, kind: str) -> Iterator[str]:
    """Yield what is wrong with one probe."""
    probe = container[kind]
    expected = ["vlafleet", "health", "--identity", option(container, "--identity")]
    asked = probe.get("exec", {}).get("command", [])
    if asked[:4] != expected:
        yield f"asks {asked}, not {expected}"
    port = option(container, "--port")
    if command(container) in SERVERS and asked[4:] not in (
        ["--address", f"localhost:{port}"],
        [] if port == "9092" else None,
    ):
        yield f"asks {asked[4:]}, not port {port}"
    if probe.get("timeoutSeconds", 1) < 10:
        yield "has less than the 10 s that a probe of Python may take"
    if kind == "livenessProbe" and probe.get("periodSeconds", 10) < 30:
        yield "costs a quarter of a CPU second more often than every 30 s"
    if kind == "startupProbe":
        period = probe.get("periodSeconds", 10)
        if period * probe.get("failureThreshold", 3) < 120:
            yield "restarts a server that starts slowly"


def images(rendered: Rendered) -> Iterator[str]:
    """An image has a tag that stays or a digest, no registry that the operator did not name, and fits its command."""
    registry = rendered.values.get("imageRegistry", "")
    named = {*_repositories(rendered.values)}
    for pod, container in every_container(rendered):
        who, image = f"{pod} {container['name']}", container["image"]
        match = IMAGE.fullmatch(image)
        if match is None:
            yield f"{who}: {image} has no tag and no digest, or both"
            continue
        if match["tag"] == "latest":
            yield f"{who}: {image} is another one tomorrow"
        repository = match["repository"].removeprefix(f"{registry}/" if registry else "")
        if registry and repository == match["repository"]:
            yield f"{who}: {image} is not of {registry}"
        fits = IMAGES.get(command(container))
        if repository not in named and repository not in {fits} | (
            set() if fits else set(IMAGES.values())
        ):
            yield f"{who}: {image} is not the image of {command(container) or 'a script'}"


def _repositories(values: dict[str, Any]) -> Iterator[str]:
    """Yield the repositories that the operator named."""
    for key, value in values.items():
        if key == "image" and isinstance(value, dict) and "repository" in value:
            yield value["repository"]
        elif isinstance(value, dict):
            yield from _repositories(value)


def no_secret_shown(rendered: Rendered) -> Iterator[str]:
    """A secret comes out of a Secret: never as an argument, never as a literal in the environment."""
    for pod, container in every_container(rendered):
        for variable in container.get("env", []):
            hidden = re.search(r"TOKEN|INVITATION|PASSWORD|KEY", variable["name"])
            if hidden and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{pod} {container['name']}: {variable['name']} is not from a Secret"
        for argument in container.get("args", []):
            if "BEGIN" in argument or argument.startswith("vlafleet1."):
                yield f"{pod} {container['name']} has a secret among its arguments"
    for secret in of_kind(rendered.manifests, "Secret"):
        yield f"Secret {secret['metadata']['name']} is in the release, where helm shows it"


def service_links(rendered: Rendered) -> Iterator[str]:
    """Services' addresses are in the environment only of the pod that has no DNS and needs one of them."""
    for pod in pod_templates(rendered.manifests):
        needed = any(
            "_SERVICE_HOST)" in argument
            for container in pod.all_containers
            for argument in container.get("args", [])
        )
        if pod.spec.get("enableServiceLinks", True) is not needed:
            yield f"{pod}: enableServiceLinks should be {needed}"


def name_resolution(rendered: Rendered) -> Iterator[str]:
    """A site's app pod asks no DNS server, which would be a way out of it: neither do its tasks' pods."""
    for pod in pod_templates(rendered.manifests):
        app = any(
            command(container) == "superexec" and "--kubernetes" not in container["args"]
            for container in pod.spec["containers"]
        )
        if (app and "federation" in rendered.values and "site" in rendered.values) or (
            pod.labels.get("app.kubernetes.io/component") == "taskexecutor"
        ):
            servers = pod.spec.get("dnsConfig", {}).get("nameservers")
            if (pod.spec.get("dnsPolicy"), servers) != ("None", ["127.0.0.1"]):
                yield f"{pod} may ask a DNS server"


def orphans(rendered: Rendered) -> Iterator[str]:
    """What runs Flower's tasks leaves orphans: something in the pod must reap them, in a namespace of its own."""
    for pod in pod_templates(rendered.manifests):
        runs_tasks = any(command(container) == "superexec" for container in pod.spec["containers"])
        alone = len(pod.spec["containers"]) == 1
        shared = pod.spec.get("shareProcessNamespace", False)
        if runs_tasks and alone and not shared:
            yield f"{pod}: nobody reaps the tasks' orphans"
        if shared and not alone:
            yield f"{pod}: its containers see each other's processes"


CHECKS: tuple[Check, ...] = (
    hardened,
    read_only_outside,
    writable,
    resources,
    scratch_fits,
    probes,
    images,
    no_secret_shown,
    service_links,
    name_resolution,
    orphans,
)
