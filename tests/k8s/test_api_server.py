"""The API server of the tests answers the official client as a real one does."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import api_server
from tests.k8s.api_server import ADMIN, Asked, Running, granted, service_account, serving

kubernetes = pytest.importorskip("kubernetes")

NAMESPACE = "robots"
POD = {
    "metadata": {"name": "task", "labels": {"app": "task"}},
    "spec": {"containers": [{"name": "c"}]},
}


def role(*rules: dict[str, Any], account: str = "worker") -> list[dict[str, Any]]:
    metadata = {"name": account, "namespace": NAMESPACE}
    return [
        {"kind": "Role", "metadata": metadata, "rules": [{"apiGroups": [""], **r} for r in rules]},
        {
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"kind": "Role", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
        },
    ]


RULES = role(
    {"resources": ["secrets"], "verbs": ["create"]},
    {"resources": ["secrets"], "verbs": ["get", "update"], "resourceNames": ["mine"]},
    {"resources": ["pods"], "verbs": ["create", "list", "delete"]},
)


@pytest.fixture
def running(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Running]:
    with serving(tmp_path / "api", free_port(), RULES) as made:
        yield made


def client(running: Running, token: str) -> Any:
    configuration = kubernetes.client.Configuration(f"https://127.0.0.1:{running.port}")
    configuration.ssl_ca_cert = str(running.authority)
    configuration.api_key = {"authorization": f"Bearer {token}"}
    return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))


@pytest.fixture
def worker(running: Running) -> Any:
    running.api.allow("secret-token", service_account(NAMESPACE, "worker"))
    return client(running, "secret-token")


def refused(code: int) -> Any:
    return pytest.raises(kubernetes.client.ApiException, match=rf"\({code}\)")


def test_secrets(running: Running, worker: Any) -> None:
    with refused(404):
        worker.read_namespaced_secret("mine", NAMESPACE)
    made = worker.create_namespaced_secret(
        NAMESPACE, {"metadata": {"name": "mine"}, "stringData": {"tls.key": "k"}}
    )
    assert (made.data, made.type) == ({"tls.key": "aw=="}, "Opaque")
    with refused(409):
        worker.create_namespaced_secret(NAMESPACE, {"metadata": {"name": "mine"}})
    first = worker.read_namespaced_secret("mine", NAMESPACE)
    body = {"metadata": {"name": "mine"}, "data": {"tls.key": "bA=="}}
    worker.replace_namespaced_secret("mine", NAMESPACE, body)
    # Read, modify, write: what was read is old by now.
    with refused(409):
        worker.replace_namespaced_secret("mine", NAMESPACE, first)
    with refused(422):
        worker.replace_namespaced_secret("mine", NAMESPACE, {**body, "type": "kubernetes.io/tls"})
    with refused(400):
        worker.create_namespaced_secret(NAMESPACE, {"metadata": {"name": "n"}, "data": {"a": "?"}})
    assert running.api.secret("mine", NAMESPACE) == {"tls.key": b"l"}


def test_pods(running: Running, worker: Any) -> None:
    worker.create_namespaced_pod(NAMESPACE, POD)
    assert worker.list_namespaced_pod(NAMESPACE, label_selector="app=other").items == []
    assert worker.list_namespaced_pod(NAMESPACE, label_selector="app!=task").items == []
    (pod,) = worker.list_namespaced_pod(NAMESPACE, label_selector="app=task").items
    assert pod.status.phase == "Pending"
    running.api.set_phase("task", NAMESPACE, "Succeeded")
    (pod,) = worker.list_namespaced_pod(NAMESPACE, label_selector="app=task").items
    assert pod.status.phase == "Succeeded"
    worker.delete_namespaced_pod("task", NAMESPACE, grace_period_seconds=0)
    assert worker.list_namespaced_pod(NAMESPACE).items == []
    with refused(404):
        worker.delete_namespaced_pod("task", NAMESPACE)


def test_a_dry_run_keeps_nothing(running: Running, worker: Any) -> None:
    made = worker.create_namespaced_pod(NAMESPACE, POD, dry_run="All")
    assert made.metadata.name == "task"
    assert worker.list_namespaced_pod(NAMESPACE).items == []
    with refused(403):
        worker.create_namespaced_pod("elsewhere", POD, dry_run="All")


def test_what_is_not_granted_is_refused(running: Running, worker: Any) -> None:
    running.api.put_secret("other", NAMESPACE, {"a": b"b"})
    with refused(403) as error:
        worker.read_namespaced_secret("other", NAMESPACE)
    user = service_account(NAMESPACE, "worker")
    assert (
        f'secrets \\"other\\" is forbidden: User \\"{user}\\" cannot get resource \\"secrets\\" in API group '
        f'\\"\\" in the namespace \\"{NAMESPACE}\\"'
    ) in error.value.body
    with refused(403):
        worker.list_namespaced_secret(NAMESPACE)
    with refused(403):
        worker.create_namespaced_pod("elsewhere", POD)
    with refused(401):
        client(running, "guessed").read_namespaced_secret("mine", NAMESPACE)
    running.api.forbid("secret-token")
    with refused(401):
        worker.create_namespaced_pod(NAMESPACE, POD)
    assert running.api.used() == set()


def test_a_rule_with_a_name_grants_no_create(running: Running, worker: Any) -> None:
    """At a create the name is not known yet to who decides."""
    rule = {"resources": ["secrets"], "verbs": ["create"], "resourceNames": ["mine"]}
    running.api.grant(role(rule))
    with refused(403):
        worker.create_namespaced_secret(NAMESPACE, {"metadata": {"name": "mine"}})


def test_granted_and_used_compare(running: Running, worker: Any) -> None:
    user = service_account(NAMESPACE, "worker")
    assert granted(RULES) == {
        Asked(user, "create", "secrets", "*", NAMESPACE),
        Asked(user, "get", "secrets", "mine", NAMESPACE),
        Asked(user, "update", "secrets", "mine", NAMESPACE),
        *(Asked(user, verb, "pods", "*", NAMESPACE) for verb in ("create", "list", "delete")),
    }
    running.api.allow("root", ADMIN)
    client(running, "root").list_namespaced_secret(NAMESPACE)
    worker.create_namespaced_pod(NAMESPACE, POD)
    worker.delete_namespaced_pod("task", NAMESPACE)
    assert running.api.used() == {
        Asked(user, "create", "pods", "", NAMESPACE),
        Asked(user, "delete", "pods", "task", NAMESPACE),
    }


def test_what_it_holds_outlives_it(tmp_path: Path, free_port: Callable[[], int]) -> None:
    directory = tmp_path / "api"
    with serving(directory, free_port()) as first:
        first.api.put_secret("mine", NAMESPACE, {"a": b"b"}, labels={"kept": "yes"})
    again = api_server.ApiServer(directory / "state")
    assert again.secret("mine", NAMESPACE) == {"a": b"b"}
    assert again.objects("secrets", NAMESPACE)["mine"]["metadata"]["labels"] == {"kept": "yes"}
