"""What the executor of a site's SuperExec is told and may do, as the chart has it, for the tests that use it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.supercore.superexec.executor import factory
from kubernetes.config import incluster_config

from tests.k8s.api_server import Running, service_account

NAMESPACE, ACCOUNT = "robots-tasks", "lab-7-app"
USER = service_account(NAMESPACE, ACCOUNT)
# What the chart grants.
RULES = [
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "list", "delete"]},
    {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create", "list", "delete"]},
]
CONFIG: dict[str, Any] = {
    "namespace": NAMESPACE,
    "image": "vlafleet-app:0.1.0",
    "labels": {"vlafleet.dev/site": "lab-7"},
    "env": [
        {"name": "VLAFLEET_IDENTITY", "value": "/identity"},
        {"name": "HF_HUB_OFFLINE", "value": "1"},
    ],
    "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}},
    "volumes": [
        {"name": "state", "persistentVolumeClaim": {"claimName": "lab-7-state"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "512Mi"}},
    ],
    "volume-mounts": [
        {"name": "state", "mountPath": "/identity", "subPath": "identity", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ],
    "affinity": {
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "app"}},
                }
            ]
        }
    },
    "pod-security-context": {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001},
    "container-security-context": {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    },
    "service-account-name": "lab-7-task",
    "active-pod-budget": 1,
    "capacity-log-interval": 60,
    "pod-spec": {
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "enableServiceLinks": False,
        "shareProcessNamespace": True,
        "runtimeClassName": "nvidia",
    },
}
LABELS = {
    "app.kubernetes.io/name": "flower",
    "app.kubernetes.io/component": "taskexecutor",
    "vlafleet.dev/site": "lab-7",
}
OWNER = {"apiVersion": "v1", "kind": "Pod", "name": "lab-7-app-0", "uid": "5f0c"}


def rbac(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    metadata = {"name": ACCOUNT, "namespace": NAMESPACE}
    subject = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}
    return [
        {"kind": "Role", "metadata": metadata, "rules": rules},
        {
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"kind": "Role", "name": ACCOUNT},
            "subjects": [subject],
        },
    ]


def pretend(
    running: Running, tmp_path: Path, patch: pytest.MonkeyPatch, namespace: str, account: str
) -> None:
    """Let this process find what the SuperExec's container does."""
    hook = "create_incluster_kubernetes_clients"
    patch.setattr(factory, hook, getattr(factory, hook))
    mount = running.mount(tmp_path / "serviceaccount", namespace, account)
    patch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(mount / "token"))
    patch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(mount / "ca.crt"))
    for name, value in running.environment.items():
        patch.setenv(name, value)
    patch.setenv("VLAFLEET_POD", OWNER["name"])
    patch.setenv("VLAFLEET_POD_UID", OWNER["uid"])


def written(tmp_path: Path, **changes: Any) -> Path:
    """The configuration with changes; a key of None is left out."""
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    path = tmp_path / "executor.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
