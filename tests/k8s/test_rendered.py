"""The rendered objects held against every check, and every check shown to see what it is there for."""

from pathlib import Path
from typing import Any

import pytest

from tests.k8s import access_checks, object_checks, pod_checks
from tests.k8s.charts import ROOT
from tests.k8s.mutations import GONE, Fault
from tests.k8s.renders import EVERY_RENDER, Rendered, rendered

CHECKS = {
    check.__name__: check
    for module in (pod_checks, object_checks, access_checks)
    for check in module.CHECKS
}


@pytest.mark.parametrize("check", CHECKS)
@EVERY_RENDER
def test_what_a_chart_renders_is_sound(chart: str, path: Path, check: str) -> None:
    assert list(CHECKS[check](rendered(chart, path))) == []


POD = "spec.template.spec"
FIRST = f"{POD}.containers.0"
SUPERLINK, ENROLMENT = "StatefulSet/fed-superlink", "StatefulSet/fed-enrolment"
LAB = "vlafleet-lab-7"
APP, JOIN = f"StatefulSet/{LAB}-app", f"Job/{LAB}-join-1"
DATA = {"name": "more", "mountPath": "/more"}
LONG = "a-name-that-is-much-too-long-for-the-labels-of-its-pods"


def fault(check: str, target: str, path: str, value: Any, says: str) -> Any:
    """A row of the table below; its id says what is wrong."""
    where = path.rpartition(".")[2] if not path.endswith(".+") else path.split(".")[-2]
    return pytest.param(check, Fault(target, path, value), says, id=f"{check}-{where or target}")


FAULTS = [
    fault("hardened", SUPERLINK, f"{POD}.securityContext.runAsUser", 0, "'runAsUser': 0"),
    fault("hardened", SUPERLINK, f"{POD}.securityContext", GONE, "securityContext is None"),
    fault("hardened", SUPERLINK, f"{POD}.hostNetwork", True, "hostNetwork"),
    fault("hardened", SUPERLINK, f"{FIRST}.securityContext.privileged", True, "'privileged': True"),
    fault("hardened", SUPERLINK, f"{FIRST}.securityContext.capabilities.add", ["KILL"], "KILL"),
    fault("hardened", SUPERLINK, f"{POD}.initContainers.0.securityContext", GONE, "identity: None"),
    fault("hardened", SUPERLINK, f"{FIRST}.ports.0.hostPort", 9092, "a port of the node"),
    fault("hardened", SUPERLINK, f"{POD}.volumes.0.nfs", {"path": "/"}, "nfs"),
    fault(
        "hardened",
        APP,
        f"{POD}.volumes.+",
        {"name": "x", "hostPath": {"path": "/x", "type": "DirectoryOrCreate"}},
        "makes a directory on the node",
    ),
    fault(
        "read_only_outside",
        JOIN,
        f"{FIRST}.volumeMounts.token.readOnly",
        GONE,
        "join may write to /var",
    ),
    fault("writable", APP, f"{POD}.volumes.tmp.emptyDir", {}, "no sizeLimit"),
    fault("writable", APP, f"{FIRST}.volumeMounts", [], "no emptyDir at /tmp"),
    fault("resources", SUPERLINK, f"{FIRST}.resources.limits.memory", GONE, "no limit of memory"),
    fault("resources", SUPERLINK, f"{FIRST}.resources.requests.cpu", GONE, "no request of cpu"),
    fault(
        "resources", SUPERLINK, f"{FIRST}.resources.requests.memory", "99Gi", "asks for more mem"
    ),
    fault("resources", APP, f"{FIRST}.resources.requests.nvidia.com/gpu", 2, "differently"),
    fault(
        "scratch_fits", APP, f"{FIRST}.resources.limits.ephemeral-storage", "1Gi", "limits below"
    ),
    fault("probes", SUPERLINK, f"{FIRST}.livenessProbe", GONE, "not ['livenessProbe'"),
    fault("probes", APP, f"{FIRST}.livenessProbe", {"exec": {}}, "not ['readinessProbe']"),
    fault("probes", SUPERLINK, f"{FIRST}.readinessProbe", {"tcpSocket": {"port": 1}}, "asks []"),
    fault("probes", ENROLMENT, f"{FIRST}.livenessProbe.exec.command.5", "localhost:1", "not port"),
    fault("probes", APP, f"{FIRST}.readinessProbe.exec.command.3", "/other", "asks ['vlafleet'"),
    fault("probes", SUPERLINK, f"{FIRST}.livenessProbe.timeoutSeconds", GONE, "less than the 10 s"),
    fault("probes", SUPERLINK, f"{FIRST}.livenessProbe.periodSeconds", 5, "more often"),
    fault("probes", SUPERLINK, f"{FIRST}.startupProbe.failureThreshold", 3, "starts slowly"),
    fault("probes", APP, f"{FIRST}.args.0", "trainer", "for ever"),
    fault("probes", APP, f"{POD}.initContainers.0.readinessProbe", {}, "runs first and has"),
    fault("images", APP, f"{FIRST}.image", "vlafleet-app:latest", "another one tomorrow"),
    fault("images", APP, f"{FIRST}.image", "vlafleet-app", "no tag and no digest"),
    fault("images", APP, f"{FIRST}.image", "vlafleet-app:1@sha256:" + 64 * "0", "or both"),
    fault(
        "images", APP, f"{FIRST}.image", "vlafleet-superlink:0.1.0", "not the image of superexec"
    ),
    fault("images", APP, f"{FIRST}.image", "hub.example/vlafleet-app:0.1.0", "not the image of"),
    fault(
        "no_secret_shown",
        JOIN,
        f"{FIRST}.env.VLAFLEET_INVITATION",
        {"name": "HF_TOKEN", "value": "x"},
        "HF_TOKEN",
    ),
    fault("no_secret_shown", JOIN, f"{FIRST}.args.+", "vlafleet1.x", "among its arguments"),
    fault(
        "no_secret_shown",
        JOIN,
        "",
        {"kind": "Secret", "metadata": {"name": "s"}},
        "Secret s is in the release",
    ),
    fault("service_links", APP, f"{POD}.enableServiceLinks", False, "should be True"),
    fault("service_links", SUPERLINK, f"{POD}.enableServiceLinks", GONE, "should be False"),
    fault("name_resolution", APP, f"{POD}.dnsPolicy", GONE, "may ask a DNS server"),
    fault("orphans", APP, f"{POD}.shareProcessNamespace", GONE, "nobody reaps"),
    fault("orphans", APP, f"{POD}.containers.+", {"name": "x"}, "see each other's"),
    fault(
        "references", "PersistentVolumeClaim/fed-superlink", "", GONE, "Claim fed-superlink, which"
    ),
    fault("references", "ServiceAccount/fed-superlink", "", GONE, "ServiceAccount fed-superlink"),
    fault(
        "references",
        JOIN,
        f"{FIRST}.env.VLAFLEET_INVITATION.valueFrom.secretKeyRef.name",
        "x",
        "Secret x, which",
    ),
    fault(
        "references",
        APP,
        f"{POD}.volumes.+",
        {"name": "v", "projected": {"sources": [{"configMap": {"name": "gone"}}]}},
        "ConfigMap gone",
    ),
    fault("mounts", SUPERLINK, f"{FIRST}.volumeMounts.+", DATA, "which is no volume"),
    fault("mounts", SUPERLINK, f"{POD}.volumes.+", {"name": "v"}, "nobody mounts v"),
    fault("mounts", SUPERLINK, f"{POD}.volumes.+", {"name": "tmp"}, "volume tmp twice"),
    fault("mounts", SUPERLINK, f"{FIRST}.env.+", {"name": "VLAFLEET_LOG_FORMAT"}, "FORMAT twice"),
    fault("mounts", SUPERLINK, f"{FIRST}.ports.+", {"containerPort": 9092}, "(9092, 'TCP') twice"),
    fault(
        "mounts",
        SUPERLINK,
        f"{FIRST}.volumeMounts.+",
        {"name": "tmp", "mountPath": "/tmp"},
        "mount /tmp twice",
    ),
    fault("selectors", SUPERLINK, "spec.template.metadata.labels", {}, "selects []"),
    fault("selectors", SUPERLINK, "spec.selector", {"matchLabels": {}}, "superexec"),
    fault("selectors", "Service/fed-superlink", "spec.selector", {}, "fed-enrolment"),
    fault("selectors", "Service/fed-superlink", "spec.ports.0.targetPort", "x", "has no port x"),
    fault("claims", "PersistentVolumeClaim/fed-superlink", "metadata.annotations", {}, "goes with"),
    fault("claims", SUPERLINK, "spec.replicas", 2, "not one pod"),
    fault(
        "claims",
        ENROLMENT,
        f"{POD}.volumes.0.persistentVolumeClaim.claimName",
        "fed-superlink",
        "may be on two nodes",
    ),
    fault(
        "claims",
        ENROLMENT,
        f"{POD}.volumes.0.persistentVolumeClaim.claimName",
        "other",
        "claim fed-enrolment is nobody's",
    ),
    fault("names", SUPERLINK, "metadata.name", LONG, "too long a name"),
    fault("names", SUPERLINK, "metadata.name", "Fed", "no DNS label"),
    fault("names", SUPERLINK, "metadata.labels", {}, "lacks the labels"),
    fault("names", SUPERLINK, "metadata.labels.helm.sh/chart", "superlink-0.1.0+x", "is no label"),
    fault("names", ENROLMENT, "metadata.name", "fed-superlink", "is there twice"),
    fault("names", SUPERLINK, f"{FIRST}.ports.0.name", "a-name-of-sixteen", "over 15"),
    fault("addresses", "Service/fed-superlink", "spec.ports.0.port", 1, "fed-superlink:9092 is no"),
    fault("addresses", "Service/fed-superlink", "", GONE, "fed-superlink:9092 is no Service"),
    fault("addresses", f"Service/{LAB}-supernode", "", GONE, ":9094 is no Service of its"),
    fault("rights", "Role/fed-enrolment", "rules.0.verbs", ["create", "list"], "may list secrets"),
    fault("rights", "Role/fed-enrolment", "rules.1", GONE, "may not get secrets"),
    fault("rights", "Role/fed-enrolment", "rules.1.resourceNames", GONE, "may get secrets in"),
    fault("rights", "RoleBinding/fed-enrolment", "subjects.0.name", "fed-superlink", "never does"),
    fault("rights", "RoleBinding/fed-enrolment", "subjects.0.name", "x", "no pod is"),
    fault(
        "rights",
        "Role/fed-enrolment",
        "",
        {"kind": "ClusterRole", "metadata": {"name": "all"}},
        "ClusterRole all",
    ),
    fault(
        "tokens", "ServiceAccount/fed-superlink", "automountServiceAccountToken", GONE, "by itself"
    ),
    fault("tokens", SUPERLINK, f"{POD}.automountServiceAccountToken", True, "into every container"),
    fault(
        "tokens",
        JOIN,
        f"{POD}.volumes.token.projected.sources.0.serviceAccountToken.expirationSeconds",
        86400,
        "the token of token is",
    ),
    fault(
        "tokens",
        JOIN,
        f"{POD}.volumes.token.projected.sources.0.serviceAccountToken.audience",
        "vault",
        "not for the API server",
    ),
    fault("tokens", JOIN, f"{FIRST}.volumeMounts.token", GONE, "has a token at []"),
    fault(
        "tokens",
        ENROLMENT,
        f"{FIRST}.volumeMounts.+",
        {"name": "token", "mountPath": "/token", "readOnly": True},
        "enrolment has a token at ['/token']",
    ),
]
BASES = {
    "fed": ("superlink", ROOT / "k8s/superlink/ci/defaults-values.yaml"),
    "vlafleet-lab-7": ("site", ROOT / "k8s/site/ci/invitation-values.yaml"),
}


@pytest.mark.parametrize(("check", "fault", "says"), FAULTS)
def test_each_check_sees_the_faults_that_it_is_there_for(
    check: str, fault: Fault, says: str
) -> None:
    release = "fed" if "/fed-" in fault.target else "vlafleet-lab-7"
    sound = rendered(*BASES[release])
    found = list(CHECKS[check](Rendered(sound.values, fault.put_into(sound.manifests))))
    new = set(found) - set(CHECKS[check](sound))
    assert any(says in problem for problem in new), found


def test_every_check_is_shown_to_see_something() -> None:
    assert {row.values[0] for row in FAULTS} == set(CHECKS)
