"""A pod for each ClientApp: what Flower's Kubernetes executor is told, and the API server as it uses it.

The executor makes a Secret with the task's token and a pod that reads it, waits while ``active-pod-budget`` pods are at
work, and removes those that ended within a minute. A pod that is not at work after 30 s comes too late: its message is
given to another (Flower 1.41). What can never work would so be tried until the round is over; hence all of it is tried
once, with dry runs, before the first message is taken.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from app.superexec import IDENTITY
from app.supervisor import SOCKET
from certs.errors import ConfigError, ConnectionRefusedByFleetError, ToolError, first_line
from certs.flower import install_cluster_client

type Json = dict[str, Any]

# Of the SuperExec's own pod, from the downward API: its name and its uid.
POD, POD_UID = "VLAFLEET_POD", "VLAFLEET_POD_UID"
# What the file may say: keys of Flower's executor that a ClientApp has a use for, and ``pod-spec``.
_KEYS: dict[str, tuple[type, ...]] = {
    "namespace": (str,),
    "image": (str,),
    "image-pull-policy": (str,),
    "labels": (dict,),
    "annotations": (dict,),
    "env": (list,),
    "volumes": (list,),
    "volume-mounts": (list,),
    "resources": (dict,),
    "node-selector": (dict,),
    "tolerations": (list,),
    "affinity": (dict,),
    "priority-class-name": (str,),
    "pod-security-context": (dict,),
    "container-security-context": (dict,),
    "service-account-name": (str,),
    "active-pod-budget": (int,),
    "capacity-poll-interval": (int, float),
    "capacity-log-interval": (int, float),
}
_REQUIRED = ("namespace", "image", "env", "active-pod-budget")
_POD_SPEC = "pod-spec"
# Fields of a pod for which Flower's executor has no key. None of them gives a pod rights.
_POD_FIELDS = (
    "dnsConfig",
    "dnsPolicy",
    "enableServiceLinks",
    "hostUsers",
    "imagePullSecrets",
    "runtimeClassName",
    "schedulerName",
    "shareProcessNamespace",
    "terminationGracePeriodSeconds",
    "topologySpreadConstraints",
)
# Seconds to connect to the API server, and for its answer.
_PATIENCE = (5.0, 30.0)
# What the objects are called that are tried and never made.
_REHEARSAL = "vlafleet-rehearsal"
_LABEL = "app.kubernetes.io/name"

_log = logging.getLogger("vlafleet.superexec")


class ClusterError(ConnectionRefusedByFleetError):
    """The API server refused a request, with an HTTP ``status``; 503 where it did not answer."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        # Flower's executor tells by it whether an object may be there all the same.
        self.status = status


class Cluster:
    """The API server as Flower's executor uses it (its ``KubernetesClient``); failures are ``ClusterError``.

    Every object that it makes belongs to the SuperExec's own pod: when somebody deletes that, a task that runs ends, as
    it does where it is a process of that pod. A container that starts again finds its task's pod at work.
    """

    def __init__(self, api: Any, owner: Json, spec: Json, *, dry: bool = False) -> None:
        self._api, self._owner, self._spec = api, owner, spec
        self._change = {"dry_run": "All"} if dry else {}
        # Every request that failed: Flower's executor tells of it in other words.
        self.failures: list[ClusterError] = []

    def create_namespaced_secret(self, namespace: str, body: Json) -> object:
        """Make the Secret with a task's token."""
        with self._asking("create secrets", namespace) as options:
            secret = self._owned(body)
            return self._api.create_namespaced_secret(namespace, secret, **self._change, **options)

    def create_namespaced_pod(self, namespace: str, body: Json) -> object:
        """Make a task's pod."""
        with self._asking("create pods", namespace) as options:
            pod = self._owned({**body, "spec": {**body["spec"], **self._spec}})
            return self._api.create_namespaced_pod(namespace, pod, **self._change, **options)

    def delete_namespaced_secret(self, name: str, namespace: str) -> object:
        """Delete a Secret."""
        with self._asking("delete secrets", namespace) as options:
            return self._api.delete_namespaced_secret(name, namespace, **self._change, **options)

    def delete_namespaced_pod(
        self, name: str, namespace: str, grace_period_seconds: int = 0
    ) -> object:
        """Delete a pod."""
        grace = {"grace_period_seconds": grace_period_seconds}
        with self._asking("delete pods", namespace) as options:
            return self._api.delete_namespaced_pod(
                name, namespace, **grace, **self._change, **options
            )

    def list_namespaced_secret(self, namespace: str, label_selector: str) -> object:
        """List the Secrets with these labels."""
        with self._asking("list secrets", namespace) as options:
            return self._api.list_namespaced_secret(
                namespace, label_selector=label_selector, **options
            )

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> object:
        """List the pods with these labels."""
        with self._asking("list pods", namespace) as options:
            return self._api.list_namespaced_pod(
                namespace, label_selector=label_selector, **options
            )

    def _owned(self, body: Json) -> Json:
        return {**body, "metadata": {**body["metadata"], "ownerReferences": [self._owner]}}

    @contextlib.contextmanager
    def _asking(self, what: str, namespace: str) -> Iterator[Json]:
        """Give a request's options, and tell what goes wrong in a sentence."""
        from kubernetes.client.exceptions import ApiException
        from pydantic import ValidationError
        from urllib3.exceptions import HTTPError

        try:
            yield {"_request_timeout": _PATIENCE}
        except ApiException as error:
            status = int(error.status or 0)
            sentence = (
                f"The cluster refuses to {what} in the namespace {namespace!r} ({status}): "
                f"{_message(error)}."
            )
            raise self._failed(sentence, status) from error
        except ValidationError as error:
            wrong = error.errors()[0]
            field = ".".join(map(str, wrong["loc"][1:]))
            sentence = f"Kubernetes knows no such object, at {field}: {wrong['msg']}."
            raise self._failed(sentence, 422) from error
        except (HTTPError, OSError) as error:
            sentence = (
                f"The cluster's API server does not answer a request to {what} "
                f"({first_line(error)}): check the NetworkPolicy of this pod."
            )
            # It may have done what it was asked.
            raise self._failed(sentence, 503) from error

    def _failed(self, sentence: str, status: int) -> ClusterError:
        self.failures.append(ClusterError(sentence, status))
        return self.failures[-1]


def prepare(path: Path, address: str, authority: Path) -> Json:
    """Return the executor's configuration out of the YAML file ``path``, after trying all that it is going to do.

    From then on Flower's executor makes its requests through ``Cluster``. ``address`` and ``authority`` are the
    SuperNode's. Raises ``ConfigError``, ``ToolError`` outside a pod, ``ConnectionRefusedByFleetError``.
    """
    config, spec = read(path)
    api, owner = _api(config["namespace"]), _owner()
    dry = Cluster(api, owner, spec, dry=True)
    _try_others(dry, config["namespace"])
    install_cluster_client(dry)
    _try_launch(dry, path, config, address, authority)
    install_cluster_client(Cluster(api, owner, spec))
    return config


def read(path: Path) -> tuple[Json, Json]:
    """Read the executor's configuration and the ``pod-spec`` in it; ``ConfigError`` names what is wrong."""
    from flwr.supercore.constant import ExecutorType
    from flwr.supercore.superexec.executor.config import load_executor_config

    try:
        config: Json = dict(load_executor_config(str(path), ExecutorType.KUBERNETES))
    except (ValueError, RecursionError) as error:
        said = first_line(error).rpartition(": ")[2]
        raise ConfigError(f"The executor's configuration {path} cannot be used: {said}.") from error
    spec = config.pop(_POD_SPEC, {})
    for missing in (key for key in _REQUIRED if key not in config):
        raise ConfigError(f"{path} lacks {missing!r}: the executor cannot make a task's pod.")
    for key, value in config.items():
        if key not in _KEYS:
            raise ConfigError(
                f"{path} has the key {key!r}, which is unknown: use {', '.join(_KEYS)} or {_POD_SPEC}."
            )
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            kinds = {str: "a text", dict: "a map", list: "a list", int: "a number"}
            raise ConfigError(f"{path}: {key} must be {kinds[_KEYS[key][0]]}, not {value!r}.")
    if config["active-pod-budget"] < 1:
        raise ConfigError(f"{path}: active-pod-budget must be 1 or more, or no task ever runs.")
    _check_environment(path, config["env"])
    # Kubernetes takes a number for a quantity; its client does not.
    config["resources"] = {
        part: {name: str(value) for name, value in amounts.items()}
        if isinstance(amounts, dict)
        else amounts
        for part, amounts in config.get("resources", {}).items()
    }
    if not isinstance(spec, dict) or (set(spec) - set(_POD_FIELDS)):
        other = ", ".join(sorted(set(spec) - set(_POD_FIELDS))) if isinstance(spec, dict) else spec
        raise ConfigError(
            f"{path}: {_POD_SPEC} is a map with none but {', '.join(_POD_FIELDS)}, not {other!r}."
        )
    return config, spec


def numeric(address: str) -> str:
    """Return ``host:port`` with the host's IP address: a task's pod has no DNS. ``ConnectionRefusedByFleetError``."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ConnectionRefusedByFleetError(
            f"The SuperNode's address {address!r} has no IP address ({first_line(error)}): "
            "check the name of its Service."
        ) from error
    ip = str(found[0][4][0])
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _check_environment(path: Path, env: list[object]) -> None:
    """Refuse an environment in which the ClientApp would not find its identity, or would look for a trainer."""
    names = [entry.get("name") for entry in env if isinstance(entry, dict)]
    if IDENTITY not in names:
        raise ConfigError(
            f"{path}: env must name {IDENTITY}, where the task's pod has the SuperExec's identity."
        )
    if SOCKET in names:
        raise ConfigError(f"{path}: env names {SOCKET}, but a task's pod has no trainer.")


def _api(namespace: str) -> Any:
    """Return the API server of the cluster that this pod runs in, by its service account."""
    from kubernetes.client import CoreV1Api
    from kubernetes.config import incluster_config
    from kubernetes.config.config_exception import ConfigException

    token = Path(incluster_config.SERVICE_TOKEN_FILENAME)
    try:
        incluster_config.load_incluster_config()  # type: ignore[no-untyped-call]
        own = (token.parent / "namespace").read_text().strip()
    except (ConfigException, OSError) as error:
        raise ToolError(
            f"The Kubernetes executor needs a pod with a service account ({first_line(error)}): "
            "mount its token, or leave out --kubernetes."
        ) from error
    if own != namespace:
        # What is owned by a pod of another namespace is removed at once.
        raise ConfigError(
            f"The executor's namespace is {namespace!r} and this pod's {own!r}: task pods run in the "
            "namespace of their SuperExec."
        )
    return CoreV1Api()


def _owner() -> Json:
    """Return this pod as an object's owner."""
    if not (os.environ.get(POD) and os.environ.get(POD_UID)):
        raise ConfigError(
            f"The Kubernetes executor needs {POD} and {POD_UID}, this pod's name and uid, from the downward API."
        )
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": os.environ[POD],
        "uid": os.environ[POD_UID],
    }


def _try_others(dry: Cluster, namespace: str) -> None:
    """See whether the service account may do what the executor does beside making a Secret and a pod."""
    for look in (dry.list_namespaced_pod, dry.list_namespaced_secret):
        look(namespace, f"{_LABEL}={_REHEARSAL}")
    for delete in (dry.delete_namespaced_pod, dry.delete_namespaced_secret):
        try:
            delete(_REHEARSAL, namespace)
        except ClusterError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise


def _try_launch(dry: Cluster, path: Path, config: Json, address: str, authority: Path) -> None:
    """Let Flower's executor launch a task, of which nothing stays."""
    from flwr.supercore.constant import ExecutorType, TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus, get_executor

    try:
        executor = get_executor(ExecutorType.KUBERNETES, config)
    except ValueError as error:
        raise ConfigError(f"{path}: {first_line(error)}.") from error
    task = ExecutionSpec(
        task_type=TaskType.CLIENT_APP,
        runtime_api_address=address,
        token=_REHEARSAL,
        insecure=False,
        root_certificates_path=str(authority),
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=False,
        task_id=1,
    )
    dry.failures.clear()
    launched = executor.launch(task)
    if launched.status == LaunchResultStatus.ACCEPTED:
        return
    if not dry.failures:
        raise ConfigError(f"{path}: {launched.message}.")
    # What follows it is the end of what was made before.
    failure = dry.failures[0]
    # A task that runs may fill a quota; an admission webhook may know no dry run.
    passing = launched.status == LaunchResultStatus.CAPACITY_REJECTED
    if not passing and failure.status != HTTPStatus.BAD_REQUEST:
        raise failure
    _log.warning("a task's pod could not be tried: %s", failure)


def _message(error: Any) -> str:
    """Return what the API server says of a refusal."""
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")
    except (KeyError, TypeError, ValueError):
        return str(error.reason)
