"""A pod per task: Flower's own executor and the official client against an API server that keeps to RBAC."""

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.supercore.constant import ExecutorType, TaskType
from flwr.supercore.superexec.executor import (
    ExecutionSpec,
    Executor,
    LaunchResultStatus,
    get_executor,
)
from kubernetes.config import incluster_config
from urllib3.exceptions import ReadTimeoutError

from app.task_pods import ClusterError, prepare, read
from certs.errors import ConfigError, ConnectionRefusedByFleetError, FleetError, ToolError
from certs.flower import install_commands
from tests.k8s.api_server import Running, granted, serving
from tests.k8s.charts import ROOT, render
from tests.k8s.executor import (
    ACCOUNT,
    CONFIG,
    LABELS,
    NAMESPACE,
    OWNER,
    RULES,
    USER,
    pretend,
    rbac,
    written,
)

EXECUTOR_VALUES = (ROOT / "k8s" / "site" / "ci").glob("executor*-values.yaml")


@pytest.fixture
def cluster(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    """An API server, and this process as if it ran in the SuperExec's pod."""
    with serving(tmp_path / "api", free_port(), rbac(RULES)) as running:
        pretend(running, tmp_path, monkeypatch, NAMESPACE, ACCOUNT)
        yield running


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    path = tmp_path / "site-ca.crt"
    path.write_text("the federation's\n")
    return path


def spec(authority: Path, task: int = 7) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=TaskType.CLIENT_APP,
        runtime_api_address="10.96.3.7:9094",
        token=f"token-of-{task}",
        insecure=False,
        root_certificates_path=str(authority),
        runtime_dependency_install=False,
        parent_pid=1,
        suppress_output=False,
        task_id=task,
    )


def prepared(path: Path, authority: Path) -> Executor:
    config = prepare(path, "10.96.3.7:9094", authority)
    return get_executor(ExecutorType.KUBERNETES, config, root_certificates_path=str(authority))


@pytest.fixture
def commands() -> Iterator[None]:
    from flwr.supercore import constant

    before = dict(constant.TASK_TYPE_TO_COMMAND)
    install_commands("/bin/serverapp", "/bin/vlafleet-clientapp", "/bin/simulation")
    yield
    constant.TASK_TYPE_TO_COMMAND.update(before)


@pytest.mark.usefixtures("commands")
def test_a_task_is_a_pod_and_a_secret_with_its_token(
    cluster: Running, tmp_path: Path, authority: Path
) -> None:
    executor = prepared(written(tmp_path), authority)
    assert cluster.api.objects("pods", NAMESPACE) == {}, "what is tried is not made"
    assert cluster.api.objects("secrets", NAMESPACE) == {}
    assert executor.launch(spec(authority)).status == LaunchResultStatus.ACCEPTED

    [(secret_name, secret)] = cluster.api.objects("secrets", NAMESPACE).items()
    assert cluster.api.secret(secret_name, NAMESPACE) == {
        "token": b"token-of-7",
        "ca.crt": authority.read_bytes(),
    }
    [(name, pod)] = cluster.api.objects("pods", NAMESPACE).items()
    assert secret_name == f"{name}-appio"
    for made in (pod, secret):
        assert made["metadata"]["labels"].items() >= LABELS.items()
        assert made["metadata"]["labels"]["flower.ai/superexec-task-id"] == "7"
        assert made["metadata"]["ownerReferences"] == [OWNER]
    wanted = pod["spec"]
    assert {key: wanted[key] for key in CONFIG["pod-spec"]} == CONFIG["pod-spec"]
    assert wanted["automountServiceAccountToken"] is False
    assert wanted["serviceAccountName"] == "lab-7-task"
    assert wanted["restartPolicy"] == "Never"
    assert wanted["affinity"] == CONFIG["affinity"]
    assert wanted["securityContext"] == CONFIG["pod-security-context"]
    credentials = {
        "name": "appio-credentials",
        "secret": {"secretName": secret_name, "defaultMode": 0o444},
    }
    assert wanted["volumes"] == [credentials, *CONFIG["volumes"]]
    [container] = wanted["containers"]
    assert container["image"] == "vlafleet-app:0.1.0"
    assert container["command"] == ["/bin/vlafleet-clientapp"]
    assert container["args"] == [
        *("--runtime-api-address", "10.96.3.7:9094"),
        *("--token-file", "/run/flwr/appio/token"),
        *("--root-certificates", "/run/flwr/appio/ca.crt"),
    ]
    assert "token-of-7" not in str(pod), "the token is in the Secret alone"
    assert container["env"] == CONFIG["env"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "1", "memory": "24Gi"}}
    assert container["securityContext"] == CONFIG["container-security-context"]


def test_the_clientapp_takes_the_arguments_of_its_pod() -> None:
    """Flower's parser and its executor agree, in the version that is installed."""
    from flwr.supernode.cli.flwr_clientapp import _parse_args_run_flwr_clientapp

    words = ["--runtime-api-address", "10.96.3.7:9094", "--token-file", "/run/flwr/appio/token"]
    words += ["--root-certificates", "/run/flwr/appio/ca.crt"]
    found = _parse_args_run_flwr_clientapp().parse_args(words)
    assert (found.token_file, found.parent_pid) == ("/run/flwr/appio/token", None)


def test_rights_are_what_is_granted_and_no_more(
    cluster: Running, tmp_path: Path, authority: Path
) -> None:
    executor = prepared(written(tmp_path), authority)
    executor.launch(spec(authority))
    [pod] = cluster.api.objects("pods", NAMESPACE)
    assert executor.get_eligible_capacity({TaskType.CLIENT_APP}) == (set(), set()), "it is at work"
    cluster.api.set_phase(pod, NAMESPACE, "Succeeded")
    assert executor.get_eligible_capacity({TaskType.CLIENT_APP})[0] == {TaskType.CLIENT_APP}
    executor._last_completed_pod_sweep_at = None  # type: ignore[attr-defined]  # a minute later
    executor.get_eligible_capacity({TaskType.CLIENT_APP})
    assert cluster.api.objects("pods", NAMESPACE) == {}
    assert cluster.api.objects("secrets", NAMESPACE) == {}
    # Names aside: RBAC cannot name what does not exist yet.
    used = {asked._replace(name="*") for asked in cluster.api.used()}
    assert used == granted(rbac(RULES))
    assert {asked.verb for asked in used if asked.resource == "secrets"} == {
        "create", "list", "delete"
    }  # fmt: skip


def test_a_superexec_that_starts_again_waits_for_the_task_that_runs(
    cluster: Running, tmp_path: Path, authority: Path
) -> None:
    path = written(tmp_path)
    prepared(path, authority).launch(spec(authority))
    [pod] = cluster.api.objects("pods", NAMESPACE)
    cluster.api.set_phase(pod, NAMESPACE, "Running")
    again = prepared(path, authority)
    assert again.get_eligible_capacity({TaskType.CLIENT_APP}) == (set(), set())
    again.close()
    assert [*cluster.api.objects("pods", NAMESPACE)] == [pod]
    # Another site's tasks in the same namespace are not counted.
    other = prepared(written(tmp_path, labels={"vlafleet.dev/site": "lab-8"}), authority)
    assert other.get_eligible_capacity({TaskType.CLIENT_APP})[0]


@pytest.mark.parametrize("resource", ["pods", "secrets"])
@pytest.mark.parametrize("verb", ["create", "list", "delete"])
def test_a_right_that_is_missing_is_named_before_the_first_task(
    cluster: Running, tmp_path: Path, authority: Path, resource: str, verb: str
) -> None:
    rules = copy.deepcopy(RULES)
    for rule in rules:
        if resource in rule["resources"]:
            rule["verbs"].remove(verb)
    cluster.api.grant(rbac(rules))
    with pytest.raises(ClusterError) as raised:
        prepare(written(tmp_path), "10.96.3.7:9094", authority)
    sentence = str(raised.value)
    assert sentence.startswith(
        f"The cluster refuses to {verb} {resource} in the namespace '{NAMESPACE}' (403): "
    )
    assert f'User "{USER}" cannot {verb}' in sentence
    assert "\n" not in sentence
    assert raised.value.exit_code == ConnectionRefusedByFleetError.exit_code


def test_a_full_quota_does_not_keep_a_superexec_from_starting(
    cluster: Running, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The task that runs may fill it."""
    refuse(cluster, monkeypatch, 403, "exceeded quota: gpus, used: requests.nvidia.com/gpu=1")
    assert prepare(written(tmp_path), "10.96.3.7:9094", authority)["active-pod-budget"] == 1
    assert "could not be tried" in caplog.text
    assert "exceeded quota" in caplog.text


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, 'violates PodSecurity "restricted:latest"'), (422, "Pod is invalid: spec.x"), (500, "")],
)
def test_a_pod_that_the_cluster_does_not_take_is_told_before_the_first_task(
    cluster: Running, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch,
    status: int, message: str,
) -> None:  # fmt: skip
    refuse(cluster, monkeypatch, status, message)
    with pytest.raises(ClusterError, match=rf"create pods in the namespace .* \({status}\)") as got:
        prepare(written(tmp_path), "10.96.3.7:9094", authority)
    assert message in str(got.value)


def refuse(running: Running, patch: pytest.MonkeyPatch, code: int, message: str) -> None:
    """Let the API server refuse every pod as an admission controller does."""
    from tests.k8s.api_server import RefusedError

    create = running.api._create

    def refused(resource: str, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
        if resource == "pods":
            raise RefusedError(code, "Forbidden", message)
        return create(resource, namespace, body)

    patch.setattr(running.api, "_create", refused)


def test_a_refusal_is_one_line_in_the_log(
    cluster: Running, tmp_path: Path, authority: Path
) -> None:
    """Flower logs what the executor answers: a sentence of ours, not headers and a body."""
    executor = prepared(written(tmp_path), authority)
    cluster.api.grant([])
    result = executor.launch(spec(authority))
    assert result.status == LaunchResultStatus.FAILED
    assert result.message is not None
    assert "\n" not in result.message
    assert "cannot create" in result.message


def test_an_api_server_that_is_gone_leaves_the_outcome_open(
    cluster: Running, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = prepared(written(tmp_path), authority)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    with pytest.raises(
        ConnectionRefusedByFleetError,
        match=r"API server does not answer a request to list pods .*check the NetworkPolicy",
    ) as raised:
        prepare(written(tmp_path), "10.96.3.7:9094", authority)
    assert "\n" not in str(raised.value)

    def silent(*_: object, **__: object) -> None:
        raise ReadTimeoutError(cast("Any", None), "/api", "Read timed out.")

    api = executor._client._api  # type: ignore[attr-defined]
    monkeypatch.setattr(api, "create_namespaced_pod", silent)
    assert executor.launch(spec(authority)).status == LaunchResultStatus.UNKNOWN
    # The pod may be there, and then needs it.
    assert len(cluster.api.objects("secrets", NAMESPACE)) == 1


def test_a_token_that_was_replaced_is_read_anew(
    cluster: Running, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives an hour, the SuperExec longer. The client looks for another each minute, here at once."""
    loader = incluster_config.InClusterConfigLoader
    begin = loader.__init__

    def impatient(self: Any, *words: Any, **options: Any) -> None:
        begin(self, *words, **options)  # type: ignore[no-untyped-call]
        self._token_refresh_period = timedelta(0)

    monkeypatch.setattr(loader, "__init__", impatient)
    executor = prepared(written(tmp_path), authority)
    path = tmp_path / "serviceaccount" / "token"
    before = path.read_text()
    cluster.mount(path.parent, NAMESPACE, ACCOUNT)
    cluster.api.forbid(before)
    assert executor.launch(spec(authority)).status == LaunchResultStatus.ACCEPTED


def test_outside_a_pod_it_says_so(
    cluster: Running, tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(kind: type[FleetError], words: str) -> None:
        with pytest.raises(kind, match=words) as raised:
            prepare(written(tmp_path), "10.96.3.7:9094", authority)
        assert "\n" not in str(raised.value)

    with monkeypatch.context() as patch:
        patch.delenv("VLAFLEET_POD_UID")
        told(ConfigError, "needs VLAFLEET_POD and VLAFLEET_POD_UID")
    with monkeypatch.context() as patch:
        patch.delenv("KUBERNETES_SERVICE_HOST")
        told(ToolError, "needs a pod with a service account .Service host/port is not set")
    (tmp_path / "serviceaccount" / "namespace").write_text("robots\n")
    told(ConfigError, "namespace is 'robots-tasks' and this pod's 'robots'")
    (tmp_path / "serviceaccount" / "token").unlink()
    told(ToolError, "Service token file does not exist.*mount its token")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"env": [*CONFIG["env"], {"name": "T", "valueFrom": {}}]},
            "'valueFrom' is not supported",
        ),
        ({"volumes": [{"name": "x", "secret": {}}]}, "secret volumes are not supported"),
        ({"volumes": [{"name": "x", "emptydir": {}}]}, "emptydir: Extra inputs are not permitted"),
        ({"pod-spec": {"hostUsers": "perhaps"}}, "spec.hostUsers: "),
        ({"resources": {"limits": {"memory": ["1Gi"]}, "most": {}}}, "resources.most: "),
    ],
)
def test_a_configuration_of_which_no_pod_can_be_made_is_named(
    cluster: Running, tmp_path: Path, authority: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(FleetError, match=words) as raised:
        prepare(written(tmp_path, **changes), "10.96.3.7:9094", authority)
    assert "\n" not in str(raised.value)
    assert cluster.api.objects("pods", NAMESPACE) == {}


@pytest.mark.parametrize("values", sorted(EXECUTOR_VALUES), ids=lambda path: path.stem)
def test_the_charts_configuration_and_rights_are_what_the_executor_takes(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch, authority: Path,
    values: Path,
) -> None:  # fmt: skip
    """Rendered by Helm, and then used by Flower's executor under the Role that is rendered with it."""
    rendered = render("site", values)
    path = tmp_path / "executor.yaml"
    [text] = [
        manifest["data"]["executor.yaml"]
        for manifest in rendered
        if manifest["kind"] == "ConfigMap" and "executor.yaml" in manifest["data"]
    ]
    path.write_text(text)
    config, _ = read(path)
    namespace = config["namespace"]
    roles = [m for m in rendered if m["kind"] in {"Role", "RoleBinding"}]
    [account] = {right.user for right in granted(roles) if right.resource == "pods"}
    with serving(tmp_path / "api", free_port(), roles) as running:
        pretend(running, tmp_path, monkeypatch, namespace, account.rpartition(":")[2])
        executor = prepared(path, authority)
        assert executor.launch(spec(authority)).status == LaunchResultStatus.ACCEPTED
        [pod] = running.api.objects("pods", namespace)
        running.api.set_phase(pod, namespace, "Failed")
        executor.get_eligible_capacity({TaskType.CLIENT_APP})
        assert running.api.objects("pods", namespace) == {}
        used = {asked._replace(name="*") for asked in running.api.used()}
        assert used == {right for right in granted(roles) if right.user == account}
