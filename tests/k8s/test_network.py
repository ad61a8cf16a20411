"""Who reaches whom under the charts' NetworkPolicies: tables of pods, what is around them, and strangers."""

import dataclasses
from typing import Any

import pytest

from tests.k8s.charts import ROOT, Manifest, render
from tests.k8s.mutations import GONE, Fault
from tests.k8s.policies import Network, Peer, outside, pod_peers
from tests.k8s.renders import EVERY_RENDER, rendered
from tests.k8s.task_pods import task_pods

# What is around a release.
AROUND = [
    Peer("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    Peer("dns", "kube-system", {"k8s-app": "kube-dns"}),
    Peer("neighbour", "vlafleet", {"app.kubernetes.io/name": "other"}),
    Peer("stranger", "elsewhere", {"app.kubernetes.io/name": "other"}),
    dataclasses.replace(outside("10.96.0.1"), name="api-server"),
    dataclasses.replace(outside("198.51.100.7"), name="member"),
    dataclasses.replace(outside("192.0.2.10"), name="federation"),
    dataclasses.replace(outside("203.0.113.9"), name="internet"),
    dataclasses.replace(outside("10.1.2.3"), name="intranet"),
    dataclasses.replace(outside("169.254.169.254"), name="metadata"),
]
PORTS = [
    *((port, "TCP") for port in (22, 53, 80, 443, 6443, 8080, 9092, 9093, 9094, 9095, 30000)),
    *((port, "UDP") for port in (53, 443)),
]
# Where the API server is, and the hub, and nowhere else.
CLOSED = {"apiServer": {"cidrs": ["10.96.0.1/32"], "ports": [443]}}
HUB = {"hubCidrs": ["203.0.113.0/24"]}
Table = dict[str, set[str]]


def table(manifests: list[Manifest], *, addresses: bool) -> Table:
    """Return who reaches which port of whom, where one of them is of the release: {"to:port": {from, …}}.

    With ``addresses`` the pods have some, and plugins that hold them against ipBlocks are asked.
    """
    pods, around = pod_peers(manifests), list(AROUND)
    # Each pod's labels, in a namespace where somebody else makes pods.
    around += [
        dataclasses.replace(pod, name=f"impostor-{pod.name}", namespace="elsewhere") for pod in pods
    ]
    everyone = [*pods, *around]
    if addresses:
        everyone = [
            peer if peer.address else dataclasses.replace(peer, address=f"10.244.0.{number}")
            for number, peer in enumerate(everyone, 1)
        ]
    network, own = Network(manifests), {(pod.name, pod.namespace) for pod in pods}
    found: Table = {}
    for source in everyone:
        for target in everyone:
            if source == target or not own & {
                (one.name, one.namespace) for one in (source, target)
            }:
                continue
            for port, protocol in PORTS:
                if network.reaches(source, target, port, protocol):
                    udp = "/udp" if protocol == "UDP" else ""
                    found.setdefault(f"{target.name}:{port}{udp}", set()).add(source.name)
    return found


def made(chart: str, values: dict[str, Any]) -> list[Manifest]:
    """Return what a chart makes of values, with the pods of tasks."""
    manifests = render(chart, values)
    return [*manifests, *task_pods(manifests)]


def both(manifests: list[Manifest]) -> Table:
    """Return the table, which must be the same whatever a plugin makes of pods' addresses."""
    found = table(manifests, addresses=False)
    assert table(manifests, addresses=True) == found
    return found


def test_the_federation_reaches_and_is_reached_as_meant() -> None:
    found = both(
        made(
            "superlink",
            {
                "federation": "acme",
                "networkPolicy": {**CLOSED, "siteCidrs": ["198.51.100.0/24"]},
            },
        )
    )
    every = {"fed-superlink", "fed-enrolment", "fed-superexec", "fed-renewal"}
    assert found == {
        "fed-superlink:9092": {"member", "prometheus", "fed-enrolment", "fed-superexec"},
        "fed-enrolment:9093": {
            *("member", "prometheus"),
            *("fed-superlink", "fed-superexec", "fed-renewal"),
        },
        "fed-superexec:9095": {"prometheus"},
        "dns:53": every,
        "dns:53/udp": every,
        "api-server:443": {"fed-enrolment", "fed-renewal"},
    }


def test_only_what_uses_the_hub_reaches_it() -> None:
    manifests = made(
        "superlink",
        {
            "federation": "acme",
            "superexec": {"models": ["lerobot/smolvla_base"]},
            "networkPolicy": {**CLOSED, **HUB},
        },
    )
    (fetch,) = (one["metadata"]["name"] for one in manifests if one["kind"] == "Job")
    assert both(manifests)["internet:443"] == {fetch}
    publishing = made(
        "superlink",
        {
            "federation": "acme",
            "superexec": {"hub": {"enabled": True, "existingSecret": "hub-token"}},
            "networkPolicy": {**CLOSED, **HUB},
        },
    )
    assert both(publishing)["internet:443"] == {"fed-superexec"}


def test_without_an_authority_nobody_asks_the_api_server() -> None:
    secrets = {name: f"{name}-tls" for name in ("superlink", "superexec", "exporter")}
    found = both(
        made(
            "superlink",
            {
                "federation": "acme",
                "certificates": {
                    "existingSecrets": secrets,
                    "revocationList": {"existingSecret": "revoked"},
                },
                "networkPolicy": {"siteCidrs": ["198.51.100.0/24"]},
            },
        )
    )
    assert found == {
        "fed-superlink:9092": {"member", "prometheus", "fed-superexec"},
        "fed-superexec:9095": {"prometheus"},
        "dns:53": {"fed-superexec"},
        "dns:53/udp": {"fed-superexec"},
    }


LAB = "vlafleet-lab-7"
SITE: dict[str, Any] = {
    "site": "lab-7",
    "federation": "acme",
    "superlink": "federation.example.org:9092",
    "enrolment": "federation.example.org:9093",
    "identity": {"invitation": {"existingSecret": "invitation"}},
    "dataset": {"existingClaim": "recordings"},
    "networkPolicy": {**CLOSED, **HUB, "superlinkCidrs": ["192.0.2.10/32"]},
}
JOINING = {
    f"{LAB}-supernode:9094": {f"{LAB}-app"},
    "federation:9092": {f"{LAB}-supernode", f"{LAB}-join-1"},
    "federation:9093": {f"{LAB}-supernode", f"{LAB}-join-1"},
    "dns:53": {f"{LAB}-supernode", f"{LAB}-join-1"},
    "dns:53/udp": {f"{LAB}-supernode", f"{LAB}-join-1"},
    "api-server:443": {f"{LAB}-join-1"},
}


def test_a_sites_app_reaches_its_supernode_and_nothing_else() -> None:
    assert both(made("site", SITE)) == JOINING


def test_a_members_site_reaches_the_federation_alone() -> None:
    member = {**SITE, "identity": {"existingSecret": "a", "superexecSecret": "b"}}
    assert both(made("site", member)) == {
        f"{LAB}-supernode:9094": {f"{LAB}-app"},
        "federation:9092": {f"{LAB}-supernode"},
        "federation:9093": {f"{LAB}-supernode"},
        "dns:53": {f"{LAB}-supernode"},
        "dns:53/udp": {f"{LAB}-supernode"},
    }


def test_metrics_are_shown_to_prometheus_alone() -> None:
    found = both(made("site", {**SITE, "metrics": {"enabled": True}}))
    assert found == {**JOINING, f"{LAB}-supernode:9095": {"prometheus"}}


def test_what_a_site_fetches_is_fetched_by_a_pod_without_its_data() -> None:
    manifests = made(
        "site",
        {
            **SITE,
            "dataset": {"hub": "acme/recordings"},
            "app": {"models": ["lerobot/smolvla_base"]},
        },
    )
    (fetch,) = (
        one["metadata"]["name"]
        for one in manifests
        if one["kind"] == "Job" and one["metadata"]["name"] != f"{LAB}-join-1"
    )
    resolving = {*JOINING["dns:53"], fetch}
    assert both(manifests) == {
        **JOINING,
        "internet:443": {fetch},
        "dns:53": resolving,
        "dns:53/udp": resolving,
    }


def test_a_tasks_pod_reaches_the_supernode_and_nothing_else() -> None:
    executor = {"executor": {"type": "kubernetes", "namespace": "tasks"}}
    found = both(made("site", {**SITE, "app": executor}))
    # The SuperExec asks for the SuperNode's address and for pods; the data are the task's.
    resolving = {*JOINING["dns:53"], f"{LAB}-app"}
    assert found == {
        **JOINING,
        f"{LAB}-supernode:9094": {f"{LAB}-app", "flwr-taskexecutor-1-first"},
        "api-server:443": {f"{LAB}-join-1", f"{LAB}-app"},
        "dns:53": resolving,
        "dns:53/udp": resolving,
    }


@EVERY_RENDER
def test_every_pod_is_under_policies_both_ways_unless_they_are_off(chart: str, path: Any) -> None:
    sound = rendered(chart, path)
    enabled = sound.values.get("networkPolicy", {}).get("enabled", True)
    network = Network(sound.manifests)
    for pod in pod_peers(sound.manifests):
        for direction in ("Ingress", "Egress"):
            assert network.isolated(pod, direction) is enabled, (pod.name, direction)


@EVERY_RENDER
def test_what_sees_a_sites_data_has_no_way_out(chart: str, path: Any) -> None:
    """Whatever else is set, no app of a site and no task of it reaches an address outside, or the node's metadata."""
    sound = rendered(chart, path)
    if chart != "site" or not sound.values.get("networkPolicy", {}).get("enabled", True):
        return
    by_executor = "executor" in sound.values.get("app", {})
    confined = {"taskexecutor"} if by_executor else {"app"}
    network = Network(sound.manifests)
    pods = [
        pod
        for pod in pod_peers(sound.manifests)
        if pod.labels["app.kubernetes.io/component"] in confined
    ]
    assert pods
    for pod in pods:
        for target in AROUND:
            for port, protocol in PORTS:
                assert not network.reaches(pod, target, port, protocol), (target.name, port)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(f"NetworkPolicy/{LAB}-app", "spec.egress.0", {}),
        Fault(f"NetworkPolicy/{LAB}-app", "spec.egress.0.to.0.podSelector", {}),
        Fault(f"NetworkPolicy/{LAB}-supernode", "spec.podSelector", {}),
        Fault(f"NetworkPolicy/{LAB}-supernode", "spec.ingress.0.from", GONE),
        Fault(f"NetworkPolicy/{LAB}-supernode", "spec.policyTypes", ["Ingress"]),
    ],
    ids=lambda fault: f"{fault.target.rpartition('/')[2]}-{fault.path}",
)
def test_the_table_tells_when_a_policy_is_wrong(fault: Fault) -> None:
    manifests = rendered("site", ROOT / "k8s/site/ci/invitation-values.yaml").manifests
    assert table(fault.put_into(manifests), addresses=True) != table(manifests, addresses=True)
