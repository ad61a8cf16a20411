"""The pods that are in no manifest: those that Flower's executor makes of the configuration in a ConfigMap."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.k8s.charts import Manifest
from tests.k8s.objects import of_kind

CONFIGURATION = "executor.yaml"


def task_pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """Yield a task's pod for each configuration of the executor, as the SuperExec reads it and Flower makes it."""
    for found in of_kind(manifests, "ConfigMap"):
        if CONFIGURATION in found.get("data", {}):
            yield _task_pod(found["data"][CONFIGURATION])


def _task_pod(text: str) -> Manifest:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import factory, kubernetes_executor, types

    from app import task_pods

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIGURATION
        path.write_text(text)
        config, spec = task_pods.read(path)
    task = types.ExecutionSpec(
        task_id=1,
        task_type=TaskType.CLIENT_APP,
        token="token",
        runtime_api_address="10.0.0.1:9094",
        insecure=False,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=False,
    )
    made: Manifest = kubernetes_executor._build_taskexecutor_pod(
        task, factory._kubernetes_executor_config_from_mapping(config), "authority", "first"
    )
    return {**made, "spec": {**made["spec"], **spec}}
