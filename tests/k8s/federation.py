"""The charts' pods as a running federation: three clusters and an operator's machine that meet at load balancers only.

lab-a joins by an invitation in a Secret; lab-b with ``vlafleet site join --helm``, whose values and Secrets are used as
they come. Whoever may not reach whom by the charts' NetworkPolicies shares no network with them.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.charts import Manifest, render
from tests.k8s.control_plane import ADDRESS, ControlPlane
from tests.k8s.engine import Engine
from tests.k8s.kubelet import Kubelet
from tests.k8s.objects import of_kind, pod_templates
from tests.k8s.wiring import Cluster, Pod, workload_pods

SUPERLINK, ENROLMENT = "superlink.fed.example", "enrolment.fed.example"
# The charts' pods that run on.
CHARTED = (
    *("fed-superlink-0", "fed-enrolment-0", "fed-superexec-0"),
    *("lab-a-supernode-0", "lab-a-app-0", "vlafleet-lab-b-supernode-0", "vlafleet-lab-b-app-0"),
)
# Documentation's addresses (RFC 5737), for where each cluster and each operator's machine is.
ADDRESSES = {
    "fed": "203.0.113.10",
    "lab-a": "198.51.100.7",
    "lab-b": "198.51.100.8",
    "office": "198.51.100.9",
}


def published(host: str, port: int) -> dict[str, Any]:
    annotations = {"external-dns.alpha.kubernetes.io/hostname": host}
    return {
        "address": f"{host}:{port}",
        "service": {"type": "LoadBalancer", "annotations": annotations},
    }


FED_VALUES: dict[str, Any] = {
    "federation": "demo",
    "superlink": published(SUPERLINK, 9092),
    "enrolment": published(ENROLMENT, 9093),
    "networkPolicy": {
        "siteCidrs": ["198.51.100.0/24"],
        "apiServer": {"cidrs": [f"{ADDRESS}/32"]},
    },
}
LAB_NETWORK: dict[str, Any] = {
    "superlinkCidrs": [f"{ADDRESSES['fed']}/32"],
    "apiServer": {"cidrs": [f"{ADDRESS}/32"]},
}


def lab_a_values(dataset: Path) -> dict[str, Any]:
    return {
        "site": "lab-a",
        "federation": "demo",
        "superlink": f"{SUPERLINK}:9092",
        "enrolment": f"{ENROLMENT}:9093",
        "identity": {"invitation": {"existingSecret": "invitation"}},
        "dataset": {"hostPath": str(dataset)},
        "app": {
            "gpu": {"count": 0},
            "resources": {
                "requests": {"cpu": "1", "memory": "2Gi"},
                "limits": {"memory": "6Gi", "ephemeral-storage": "4Gi"},
            },
        },
        "networkPolicy": LAB_NETWORK,
    }


@dataclasses.dataclass(frozen=True)
class Release:
    """A release of Helm's."""

    cluster: str
    chart: str
    name: str
    namespace: str
    values: Mapping[str, Any]
    # Objects that it finds in its namespace.
    found: tuple[Manifest, ...] = ()

    @functools.cached_property
    def manifests(self) -> list[Manifest]:
        """All the objects."""
        made = render(self.chart, self.values, release=self.name, namespace=self.namespace)
        return [*made, *self.found]


@dataclasses.dataclass
class Federation:
    """What runs: the clusters and their pods by name."""

    engine: Engine
    kubelet: Kubelet
    control: ControlPlane
    clusters: dict[str, Cluster]
    pods: dict[str, Pod] = dataclasses.field(default_factory=dict)
    # What Helm installed, by cluster.
    releases: dict[str, Release] = dataclasses.field(default_factory=dict)

    def install(self, release: Release) -> list[Pod]:
        """Do what ``helm upgrade --install`` and a cluster's controllers do; return the pods as they are to run on."""
        self.releases[release.cluster] = release
        namespace, manifests = release.namespace, release.manifests
        here = self.clusters[release.cluster]
        root = {"kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}}
        here.apply([*manifests, {**root, "data": {"ca.crt": self.control.authority}}], namespace)
        self.control.grant(manifests)
        wanted = []
        for pod in workload_pods(here, manifests):
            known = self.pods.setdefault(pod.name, pod)
            known.labels, known.spec = pod.labels, pod.spec
            wanted.append(known)
        return wanted

    def start(self, pods: list[Pod]) -> None:
        """Start pods and wait until they are ready."""
        self.kubelet.start_all(pods)
        for pod in pods:
            self.kubelet.wait_ready(pod)

    def run_jobs(self, release: Release, kind: str) -> dict[str, str]:
        """Run the pods of a release's Jobs or CronJobs to their ends; return what each printed, by its name."""
        done = {}
        for template in pod_templates(of_kind(release.manifests, kind)):
            name, namespace = template.name, template.namespace
            pod = Pod(
                self.clusters[release.cluster], name, namespace, template.labels, template.spec
            )
            done[name] = self.kubelet.run(pod)
        return done

    def addresses(self, pod: Pod) -> list[str]:
        """Return a pod's addresses, one for each pod that it may talk with."""
        return [link.address(pod) for link in self.kubelet.links(pod)]

    def execute(self, pod: str, *command: str, **options: Any) -> str:
        """Run a command in a pod's first container."""
        found = self.pods[pod]
        return self.kubelet.execute(found, found.spec["containers"][0]["name"], *command, **options)

    def operate(self, *command: str, **options: Any) -> str:
        """Run vlafleet as the federation's operator, on a machine outside of the clusters."""
        return self.execute("operator", "vlafleet", *command, **options)


def machine(
    running: Federation, cluster: str, name: str, image: str, volumes: Mapping[str, Any]
) -> Pod:
    """Start a machine outside of Kubernetes, for somebody to type on."""
    mounts = {"identity": "/identity", "dataset": "/data", "home": "/home/vlafleet"}
    environment = {
        "VLAFLEET_IDENTITY": "/identity",
        "VLAFLEET_SUPERLINK": f"{SUPERLINK}:9092",
        "VLAFLEET_ENROLMENT": f"{ENROLMENT}:9093",
    }
    shell = {
        "name": "shell",
        "image": f"vlafleet-{image}:0.1.0",
        "command": ["sleep", "infinity"],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "volumeMounts": [{"name": one, "mountPath": mounts[one]} for one in volumes],
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001},
        "containers": [shell],
        "volumes": [{"name": one, **volume} for one, volume in volumes.items()],
    }
    made = running.pods[name] = Pod(running.clusters[cluster], name, cluster, {}, spec)
    running.start([made])
    return made


def invite(running: Federation, site: str) -> None:
    """Put an invitation into the Secret of a site's namespace that the chart's values name."""
    invitation = running.operate("site", "invite", site).split()[-1]
    running.control.put_secret(site, "invitation", {"invitation": invitation.encode()})


def join_by_invitation(running: Federation, dataset: Path) -> None:
    """lab-a: the invitation is a Secret, the chart's Job does the rest."""
    invite(running, "lab-a")
    release = Release("lab-a", "site", "lab-a", "lab-a", lab_a_values(dataset))
    pods = running.install(release)
    running.run_jobs(release, "Job")
    running.start(pods)


def join_with_helm(running: Federation, dataset: Path) -> None:
    """lab-b: ``site join --helm`` makes keys and values; its Secrets are made as the next steps that it prints do."""
    invitation = running.operate("site", "invite", "lab-b").split()[-1]
    volumes = {
        "dataset": {"hostPath": {"path": str(dataset)}},
        "home": {"emptyDir": {}},
    }
    machine(running, "lab-b", "desk", "supernode", volumes)
    home = "/home/vlafleet/lab-b"
    join = ["site", "join", invitation, "--helm", "--dataset", "/data", "--directory", home]
    steps = running.execute("desk", "vlafleet", *join)
    release = "vlafleet-lab-b"
    for secret, directory in (("identity", "identity"), ("superexec", "superexec")):
        assert f"create secret generic {release}-{secret} " in steps
        listed = running.execute("desk", "ls", f"{home}/{directory}").split()
        held = {
            name: running.execute("desk", "cat", f"{home}/{directory}/{name}").encode()
            for name in listed
            if f"{home}/{directory}/{name}" in steps
        }
        assert {"tls.key", "tls.crt", "ca.crt"} <= held.keys()
        running.control.put_secret("lab-b", f"{release}-{secret}", held)
    values = yaml.safe_load(running.execute("desk", "cat", f"{home}/values.yaml"))
    running.kubelet.delete(running.pods.pop("desk"))
    claim = values["dataset"]["existingClaim"]
    brought = {"kind": "PersistentVolumeClaim", "metadata": {"name": claim}}
    values["networkPolicy"] = LAB_NETWORK
    pods = running.install(Release("lab-b", "site", release, "lab-b", values, (brought,)))
    running.kubelet.fill(running.clusters["lab-b"], "lab-b", claim, dataset)
    running.start(pods)


def journal(running: Federation) -> list[dict[str, Any]]:
    text = running.execute("fed-superexec-0", "cat", "/runs/latest/rounds.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def online(running: Federation) -> dict[str, str]:
    """Return the sites as the operator's list has them."""
    lines = running.operate("site", "list").splitlines()
    return dict(line.split()[:2] for line in lines if line.startswith("lab-"))


def wait_online(running: Federation) -> None:
    deadline = time.monotonic() + 180
    while online(running) != {"lab-a": "online", "lab-b": "online"}:
        assert time.monotonic() < deadline, online(running)
        time.sleep(2)


def each_container(running: Federation) -> Iterator[tuple[Pod, dict[str, Any]]]:
    """Yield every container of the charts that runs."""
    for pod in running.pods.values():
        if pod.name in CHARTED:
            for container in pod.spec["containers"]:
                yield pod, container
