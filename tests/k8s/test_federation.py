"""The charts' pods, as Helm renders them, really run: one SuperLink, two sites, a round at both, an upgrade."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.charts import NAMESPACE
from tests.k8s.control_plane import ControlPlane
from tests.k8s.engine import Engine
from tests.k8s.federation import (
    ADDRESSES,
    CHARTED,
    FED_VALUES,
    SUPERLINK,
    Federation,
    Release,
    each_container,
    invite,
    join_by_invitation,
    join_with_helm,
    journal,
    machine,
    wait_online,
)
from tests.k8s.kubelet import Kubelet
from tests.k8s.objects import of_kind
from tests.k8s.wiring import Cluster, Wiring

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]

# Whose pods are annotated.
COMPONENTS = {"superlink": ("superlink", "enrolment", "superexec"), "site": ("supernode", "app")}
RUN = "rounds=1 local-steps=2 batch-size=1 eval-batches=1"
# Says for each address whether a TCP connection opens within a second; a closed port is an answer too.
REACH = """
import socket, sys
for target in sys.argv[1:]:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
        print("open")
    except ConnectionRefusedError:
        print("refused")
    except OSError:
        print("unreachable")
"""
KEYS = "find / \\( -path /proc -o -path /sys \\) -prune -o -name '*.key' -print 2>/dev/null || true"
# Issues a certificate as it was 60 days ago, for an identity of the authority's own making, and prints it.
AGED = """
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from certs import authority, files
from certs.roles import Role
authority.CLOCK_SKEW = timedelta(days=60)
pki = authority.Authority.load(Path("/data/pki/ca"))
role, name = sys.argv[1:]
key = files.load_certificate(Path("/data/pki", role, name, "tls.crt")).public_key()
issued = pki.issue(key, Role(role), name, lifetime=timedelta(days=5))
print(files.pem_certificate(issued).decode(), end="")
"""


@pytest.fixture(scope="module")
def federation(
    images: None,
    demo_datasets: Path,
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
) -> Iterator[Federation]:
    """The federation, ready for its first run; everything of it is removed at the end."""
    engine = Engine(f"vlafleet-k8s-{os.getpid()}")
    scratch = tmp_path_factory.mktemp("kubernetes")
    try:
        wiring = Wiring(engine, engine.free_block())
        user = f"{os.getuid()}:{os.getgid()}"
        control = ControlPlane(engine, wiring, scratch / "api", free_port(), user)
        kubelet = Kubelet(
            engine, wiring, scratch, secret=control.secret, token=control.token, api=control.pod
        )
        clusters = {name: Cluster(name, address) for name, address in ADDRESSES.items()}
        running = Federation(engine, kubelet, control, clusters)
        fed = Release("fed", "superlink", "fed", NAMESPACE, FED_VALUES)
        running.start(running.install(fed))
        handed = control.secret(NAMESPACE, "fed-operator")
        assert handed is not None
        control.put_secret("office", "admin", handed)
        volumes = {
            "identity": {"secret": {"secretName": "admin", "defaultMode": 0o400}},
            "home": {"emptyDir": {}},
        }
        machine(running, "office", "operator", "superlink", volumes)
        join_by_invitation(running, demo_datasets / "site-a")
        join_with_helm(running, demo_datasets / "site-b")
        yield running
    finally:
        engine.clear()
        assert engine.leftovers() == {"container": [], "volume": [], "network": []}


def test_a_round_completes_at_both_sites(federation: Federation) -> None:
    federation.operate("run", "--run-config", RUN, timeout=900)
    first, last = journal(federation)
    assert (first["round"], last["round"]) == (0, 1)
    assert {name: site["train"]["state"] for name, site in last["sites"].items()} == {
        "lab-a": "completed",
        "lab-b": "completed",
    }


def test_every_probe_passes(federation: Federation) -> None:
    asked = set()
    for pod, container in each_container(federation):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container:
                assert federation.kubelet.probe(pod, container, kind) is None
                asked.add((container["name"], kind))
    names = {"superlink", "enrolment", "superexec", "exporter", "supernode", "app"}
    assert {name for name, kind in asked if kind == "readinessProbe"} == names


def test_processes_run_without_privileges_and_without_a_token(federation: Federation) -> None:
    for pod, container in each_container(federation):
        execute = functools.partial(federation.kubelet.execute, pod, container["name"])
        status = dict(
            line.split(":\t", 1) for line in execute("cat", "/proc/self/status").splitlines()
        )
        assert status["Uid"].split() == ["10001"] * 4
        assert int(status["CapEff"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert "Read-only file system" in execute("touch", "/opt/vlafleet/x", check=False)
        assert "No such file" in execute("ls", "/var/run/secrets", check=False)


def test_keys_are_with_their_holders_only(federation: Federation) -> None:
    held = {}
    for pod, container in each_container(federation):
        # Not every directory of the image lets its user look; none of those is a volume.
        listed = federation.kubelet.execute(pod, container["name"], "sh", "-c", KEYS)
        held[container["name"] if pod.name.startswith("fed-") else pod.name] = set(listed.split())
    # The authority's key, and those of all that it made.
    assert "/data/pki/ca/ca.key" in held.pop("enrolment")
    own = {"/data/identity/tls.key"}
    node = {"/data/identity/node.key", "/data/identity/tls.key"}
    assert held == {
        "superlink": own,
        "superexec": {"/identity/tls.key"},
        "exporter": {"/identity/tls.key"},
        "lab-a-supernode-0": node,
        "lab-a-app-0": {"/identity/tls.key"},
        "vlafleet-lab-b-supernode-0": node,
        "vlafleet-lab-b-app-0": {"/identity/tls.key"},
    }


def test_who_reaches_whom(federation: Federation) -> None:
    pods = federation.pods
    reached = {
        name: {
            other: federation.execute(name, "python", "-c", REACH, *targets).split()
            for other, target in pods.items()
            if other != name
            and (targets := [f"{one}:{port}" for one in federation.addresses(target) for port in target.ports.values()])
        }
        for name in CHARTED
    }  # fmt: skip
    got = {
        (name, other)
        for name, answers in reached.items()
        for other, answer in answers.items()
        if set(answer) != {"unreachable"}
    }
    servers = {"fed-superlink-0", "fed-enrolment-0"}
    assert {pair for pair in got if pair[0].endswith("-app-0")} == {
        ("lab-a-app-0", "lab-a-supernode-0"),
        ("vlafleet-lab-b-app-0", "vlafleet-lab-b-supernode-0"),
    }
    for lab in ("lab-a", "vlafleet-lab-b"):
        own = {other for name, other in got if name == f"{lab}-supernode-0"}
        # Its app, which asks it, opens no port.
        assert own == servers
    # An app has neither a way out nor names for one.
    for target in ("192.0.2.1:443", f"{SUPERLINK}:9092"):
        assert federation.execute("lab-a-app-0", "python", "-c", REACH, target) == "unreachable\n"


def identities(running: Federation) -> dict[str, Any]:
    """Return the certificates that lie in volumes, and what every Secret holds besides the newest revocation list."""
    look = "cat /identity/tls.crt /data/identity/tls.crt 2>/dev/null || true"
    found: dict[str, Any] = {
        f"{pod.name}/{container['name']}": running.kubelet.execute(
            pod, container["name"], "sh", "-c", look
        )
        for pod, container in each_container(running)
    }
    for namespace in (NAMESPACE, "lab-a", "lab-b"):
        for name in running.control.secrets(namespace):
            held = dict(running.control.secret(namespace, name) or {})
            held.pop("crl.pem", None)
            found[f"{namespace}/{name}"] = held
    return found


def test_an_upgrade_replaces_every_pod_and_nothing_that_lives(federation: Federation) -> None:
    before, records = identities(federation), journal(federation)
    for release in list(federation.releases.values()):
        annotated = {
            component: {**release.values.get(component, {}), "podAnnotations": {"revision": "2"}}
            for component in COMPONENTS[release.chart]
        }
        after = dataclasses.replace(release, values={**release.values, **annotated})
        for workload in of_kind(after.manifests, "StatefulSet"):
            noted = workload["spec"]["template"]["metadata"]["annotations"]
            assert noted["revision"] == "2"
        for job in of_kind(after.manifests, "Job"):
            # As Helm's second revision names it.
            job["metadata"]["name"] = re.sub("1$", "2", job["metadata"]["name"])
        pods = federation.install(after)
        for pod in pods:
            federation.kubelet.delete(pod)
        federation.run_jobs(after, "Job")
        federation.start(pods)
        for pod in pods:
            assert pod.logs
            assert all("kept" in log for log in pod.logs.values()), pod.logs
    assert identities(federation) == before
    assert journal(federation) == records
    wait_online(federation)


def test_what_no_process_renews_the_cronjob_does(federation: Federation) -> None:
    names = ("fed-monitor", "fed-operator")
    for role, name, secret in (
        ("monitor", "prometheus", names[0]),
        ("operator", "admin", names[1]),
    ):
        aged = federation.execute("fed-enrolment-0", "python", "-c", AGED, role, name)
        held = federation.control.secret(NAMESPACE, secret)
        assert held is not None
        federation.control.put_secret(NAMESPACE, secret, {**held, "tls.crt": aged.encode()})
    aged_ones = {name: federation.control.secret(NAMESPACE, name) for name in names}
    federation.run_jobs(federation.releases["fed"], "CronJob")
    for name in names:
        now, then = federation.control.secret(NAMESPACE, name), aged_ones[name]
        assert now is not None
        assert then is not None
        assert now["tls.key"] != then["tls.key"]
        assert now["ca.crt"] == then["ca.crt"]


def test_a_site_that_was_revoked_joins_again_by_another_invitation(federation: Federation) -> None:
    federation.operate("site", "revoke", "lab-a")
    before = federation.control.secret("lab-a", "lab-a-identity")
    invite(federation, "lab-a")
    federation.run_jobs(federation.releases["lab-a"], "Job")
    after = federation.control.secret("lab-a", "lab-a-identity")
    assert before is not None
    assert after is not None
    assert {name for name in after if after[name] != before[name]} == {
        *("tls.key", "tls.crt", "node.key", "node.pub"),
    }
    pods = [federation.pods[f"lab-a-{component}-0"] for component in COMPONENTS["site"]]
    for pod in pods:
        federation.kubelet.delete(pod)
    federation.start(pods)
    for pod in pods:
        assert "taken" in pod.logs["identity"]
    wait_online(federation)


def test_rights_are_used_and_none_is_missed(federation: Federation) -> None:
    assert federation.control.refused() == []
    used, granted = federation.control.used(), federation.control.granted()
    assert used <= granted
    # Of a service account's objects not each had to be renewed in this hour, but each verb was of use.
    assert {right[:3] for right in granted} == {one[:3] for one in used}
