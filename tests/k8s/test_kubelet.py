"""The tests' kubelet does as Kubernetes: on paper, and with a pod of its own in Docker."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.container_options import expand, in_bytes, limits, require_known, security
from tests.k8s.engine import Engine
from tests.k8s.kubelet import Kubelet
from tests.k8s.pod_files import MissingError, archive, files
from tests.k8s.wiring import Cluster, Pod, Wiring, reaches, workload_pods

IMAGE = "vlafleet-superlink:0.1.0"


def test_variables_expand_as_in_kubernetes() -> None:
    known = {"A": "1", "B_HOST": "10.0.0.7"}
    assert expand("$(B_HOST):9094", known) == "10.0.0.7:9094"
    assert expand("$(A)$(A)", known) == "11"
    # An unknown one stays, a doubled dollar is one that means nothing.
    assert expand("$(C) $$(A) $A ${A}", known) == "$(C) $(A) $A ${A}"


def test_security_contexts_and_limits_become_dockers_options() -> None:
    pod = {"securityContext": {"runAsUser": 1, "runAsGroup": 2, "fsGroup": 3}}
    held = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert security(pod, {"securityContext": held}) == [
        *("--user", "1:2", "--group-add", "3", "--read-only", "--cap-drop", "ALL"),
        *("--security-opt", "no-new-privileges"),
    ]
    # Who says nothing is as free as Kubernetes leaves them.
    assert security({}, {}) == ["--security-opt", "seccomp=unconfined"]
    assert limits({"resources": {"limits": {"memory": "64Mi", "cpu": "250m"}}}) == [
        *("--memory", "67108864", "--memory-swap", "67108864", "--cpus", "0.250"),
    ]
    assert (in_bytes("1Gi"), in_bytes("2M"), in_bytes(7)) == (2**30, 2_000_000, 7)


def test_what_the_kubelet_does_not_know_is_refused() -> None:
    require_known({"containers": [{"name": "a", "args": []}]})
    with pytest.raises(AssertionError, match=r"\['hostNetwork', 'lifecycle'\]"):
        require_known({"hostNetwork": True, "containers": [{"name": "a", "lifecycle": {}}]})


def found(kind: str, name: str) -> dict[str, bytes] | None:
    return {"tls.key": b"key", "ca.crt": b"ca"} if (kind, name) == ("Secret", "there") else None


def test_volumes_hold_what_their_sources_say() -> None:
    projected = {
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"secret": {"name": "there", "items": [{"key": "ca.crt", "path": "x/ca.pem"}]}},
                {"secret": {"name": "away", "optional": True}},
                {"serviceAccountToken": {"path": "token"}},
                {
                    "downwardAPI": {
                        "items": [{"path": "ns", "fieldRef": {"fieldPath": "metadata.namespace"}}]
                    }
                },
            ],
        }
    }
    held = files(projected, found, "t0ken", {"metadata.namespace": "here"})
    assert held == {
        "x/ca.pem": (0o440, b"ca"),
        "token": (0o440, b"t0ken"),
        "ns": (0o440, b"here"),
    }
    with pytest.raises(MissingError, match="Secret away"):
        files({"secret": {"secretName": "away"}}, found, "", {})
    wanted = [{"key": "tls.crt", "path": "tls.crt"}]
    with pytest.raises(MissingError, match=r"\['tls.crt'\] of Secret there"):
        files({"secret": {"secretName": "there", "items": wanted}}, found, "", {})


def test_files_lie_behind_links_and_belong_to_the_group() -> None:
    packed = archive({"v": {"x/ca.pem": (0o400, b"ca")}}, 10001)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        held = {entry.name: entry for entry in tar}
    assert held["v/..data"].linkname == "..1"
    assert held["v/x"].linkname == "..data/x"
    real = held["v/..1/x/ca.pem"]
    assert (real.mode, real.uid, real.gid) == (0o440, 0, 10001)


def stateful(name: str, port: int) -> dict[str, Any]:
    template = {
        "metadata": {"labels": {"app": name}},
        "spec": {
            "containers": [{"name": name, "image": IMAGE, "ports": [{"containerPort": port}]}]
        },
    }
    return {"kind": "StatefulSet", "metadata": {"name": name}, "spec": {"template": template}}


def service(name: str, port: int, kind: str = "ClusterIP") -> dict[str, Any]:
    spec = {"type": kind, "selector": {"app": name}, "ports": [{"port": port}]}
    return {"kind": "Service", "metadata": {"name": name}, "spec": spec}


def test_clusters_meet_at_load_balancers_that_their_policies_allow() -> None:
    here, there = Cluster("here", "203.0.113.1"), Cluster("there", "203.0.113.2")
    # Each cluster's policy says which of the other's address it has to do with.
    lets = {
        "kind": "NetworkPolicy",
        "metadata": {"name": "server"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"ipBlock": {"cidr": "203.0.113.2/32"}}]}],
        },
    }
    inside, server = stateful("inside", 1), stateful("server", 2)
    here.apply([inside, server, service("server", 2), lets], "a")
    there.apply([stateful("client", 3)], "b")
    pods = {
        pod.name: pod
        for cluster in (here, there)
        for pod in workload_pods(cluster, list(cluster.objects.values()))
    }
    client, target = pods["client-0"], pods["server-0"]
    # Not published, and within the cluster not allowed.
    assert not reaches(client, target)
    assert not reaches(pods["inside-0"], target)
    assert not reaches(target, client)
    assert reaches(target, pods["inside-0"])
    here.apply([service("server", 2, "LoadBalancer")], "a")
    assert reaches(client, target)


LOOK = """
cat /etc/secret/key; stat -Lc ' %a %g' /etc/secret/key
stat -c '%a %u %g' /data /data/sub /tmp | tr '\\n' ' '
id -u; id -G; echo "$A $LATER_SERVICE_PORT $(hostname)"
touch /data/sub/x; echo 1 >> /data/sub/runs; wc -l < /data/sub/runs
touch /x 2>/dev/null || echo no root
ls /var/run/secrets 2>/dev/null || echo no token
cat /etc/resolv.conf
sed -n 's/CapEff:\\t//p' /proc/self/status
"""


@pytest.fixture
def kubelet(engine: None, tmp_path: Path) -> Iterator[tuple[Kubelet, Engine]]:
    own = Engine(f"vlafleet-kubelet-{os.getpid()}")
    wiring = Wiring(own, own.free_block())
    serving = {"name": "api", "ports": [{"containerPort": 6443}]}
    api = Pod(Cluster("none", "192.0.2.53"), "api", "default", {}, {"containers": [serving]})

    def secret(_: str, name: str) -> dict[str, bytes] | None:
        return found("Secret", name)

    made = Kubelet(own, wiring, tmp_path, secret=secret, token=lambda *_: "t", api=api)
    try:
        yield made, own
    finally:
        own.clear()
        assert own.leftovers() == {"container": [], "volume": [], "network": []}


@pytest.mark.docker
@pytest.mark.slow
def test_a_pod_is_as_kubernetes_would_have_it(
    images: None, kubelet: tuple[Kubelet, Engine]
) -> None:
    cluster = Cluster("here", "203.0.113.1")
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "claim"}}
    cluster.apply([claim, service("later", 7)], "n")
    context = {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    mounts = [
        {"name": "claim", "mountPath": "/data"},
        {"name": "secret", "mountPath": "/etc/secret"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    look = {
        "name": "look",
        "image": IMAGE,
        "command": ["sh", "-c", LOOK],
        "env": [{"name": "B", "value": "b"}, {"name": "A", "value": "$(B)$(B)"}],
        "securityContext": context,
        "volumeMounts": mounts,
    }
    # The kubelet makes a subPath that is missing.
    sub = {"name": "claim", "mountPath": "/sub", "subPath": "sub"}
    first = {**look, "name": "first", "command": ["true"], "volumeMounts": [sub]}
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "dnsPolicy": "None",
        "securityContext": {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10002},
        "initContainers": [first],
        "containers": [look],
        "volumes": [
            {"name": "claim", "persistentVolumeClaim": {"claimName": "claim"}},
            {"name": "secret", "secret": {"secretName": "there", "items": [ITEM], **MODE}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Mi"}},
        ],
    }
    wanted = [
        "key 440 10002",
        "2775 0 10002 2775 0 10002 2777 0 10002 10001",
        "10001 10002",
        "bb 7 pod",
        *("1", "no root", "no token", "nameserver 127.0.0.1", "0000000000000000"),
    ]
    made = kubelet[0]
    assert made.run(Pod(cluster, "pod", "n", {}, spec)).splitlines() == wanted
    # The claim's volume outlives the pod.
    assert made.run(Pod(cluster, "pod", "n", {}, spec)).splitlines()[4] == "2"
    # And what is not there yet is waited for.
    spec["volumes"][1]["secret"]["secretName"] = "away"
    with pytest.raises(AssertionError, match="Secret away"):
        made.start_all([Pod(cluster, "pod", "n", {}, spec)])


ITEM = {"key": "tls.key", "path": "key"}
MODE = {"defaultMode": 0o400}
