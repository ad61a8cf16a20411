"""Every hook into Flower, in one place.

Flower 1.41 has no client certificates, starts its task processes by name, and cuts large messages for fast links. A
contract test (``tests/certs/test_flower.py``) names the seam that changed when Flower changes underneath.
"""

import contextlib
import importlib
import inspect
import io
import os
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from certs.contexts import client_context
from certs.errors import CertificateError, ConfigError
from certs.identity import Identity

# Switches of Flower, and of ray under its simulation, for what leaves the machine or changes it at run time. Set
# before either is imported.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Despite its name it holds on Linux, too: ray listens on loopback, not on the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# The components every bundle names; the code behind them is the installed one.
COMPONENTS = {"serverapp": "app.server_app:app", "clientapp": "app.client_app:app"}

# The modules of the task processes.
SERVERAPP_TASK = "flwr.superlink.runtime.run_serverapp"
CLIENTAPP_TASK = "flwr.supernode.runtime.run_clientapp"
SIMULATION_TASK = "flwr.simulation.app"


class HookError(RuntimeError):
    """Flower changed where this project hooks into it."""


def quiet() -> None:
    """Switch off Flower's telemetry, update check and runtime dependency installation, for children too.

    Flower keeps bundles and settings in ``FLWR_HOME``; unless set, that is a folder of this project's own.
    """
    os.environ.update(ENVIRONMENT)
    home = os.environ.get("VLAFLEET_HOME") or Path.home() / ".cache" / "vlafleet"
    os.environ.setdefault("FLWR_HOME", str(Path(home) / "flwr"))


def install_client(
    identity: Identity, on_response: Callable[[httpx.Response], None] | None = None
) -> None:
    """Make every Flower client of this process present ``identity``, over TLS only.

    Hook: ``flwr.supercore.protobuf.client.ProtobufClient.__init__`` takes ``verify``. SuperNode, SuperExec, ServerApp,
    ClientApp and the ``flwr`` command all make their connections through it.
    """
    from flwr.supercore.protobuf.client import ProtobufClient

    check_client_hook(ProtobufClient)
    original = ProtobufClient.__init__
    context = client_context(identity)

    def __init__(self: Any, base_url: str, **options: Any) -> None:  # noqa: N807
        if not base_url.startswith("https://"):
            raise CertificateError(
                f"{base_url} is not https; this federation speaks mutual TLS only"
            )
        original(self, base_url, **{**options, "verify": context})
        if on_response is not None:
            self._client.event_hooks = {"response": [on_response]}

    ProtobufClient.__init__ = __init__  # type: ignore[method-assign]


def check_client_hook(client: type) -> None:
    """Raise ``HookError`` unless ``ProtobufClient`` still takes ``base_url`` and ``verify``."""
    parameters = inspect.signature(client.__init__).parameters  # type: ignore[misc]
    if not {"self", "base_url", "verify"} <= set(parameters):
        raise HookError(
            "the hook ProtobufClient.__init__(base_url, *, verify) is gone from Flower: "
            "client certificates cannot be presented"
        )


def install_commands(serverapp: str, clientapp: str, simulation: str) -> None:
    """Make SuperExec start these programs for a ServerApp, a ClientApp and a simulation task.

    Hook: the table ``flwr.supercore.constant.TASK_TYPE_TO_COMMAND``, read by ``SubprocessExecutor.launch``, and by
    ``KubernetesExecutor.launch`` for the command of a task's pod.
    """
    from flwr.supercore import constant
    from flwr.supercore.superexec.executor import kubernetes_executor, subprocess_executor

    check_command_hook(constant, subprocess_executor, kubernetes_executor)
    constant.TASK_TYPE_TO_COMMAND.update(
        {
            constant.TaskType.SERVER_APP: serverapp,
            constant.TaskType.CLIENT_APP: clientapp,
            constant.TaskType.SIMULATION: simulation,
        }
    )


def check_command_hook(constant: Any, *executors: Any) -> None:
    """Raise ``HookError`` unless the executors' modules still read the table of task commands."""
    table: Any = getattr(constant, "TASK_TYPE_TO_COMMAND", None)
    types: Any = getattr(constant, "TaskType", None)
    wanted = [getattr(types, name, None) for name in ("SERVER_APP", "CLIENT_APP", "SIMULATION")]
    used = [getattr(executor, "TASK_TYPE_TO_COMMAND", None) for executor in executors]
    if (
        not isinstance(table, dict)
        or any(found is not table for found in used)
        or any(task not in table for task in wanted)
    ):
        raise HookError(
            "the hook TASK_TYPE_TO_COMMAND is gone from Flower's executors: "
            "SuperExec would start tasks without a certificate"
        )


def install_cluster_client(client: Any) -> None:
    """Let Flower's Kubernetes executor make its requests through ``client``, a ``KubernetesClient`` of Flower's.

    Hook: ``create_incluster_kubernetes_clients`` in ``flwr.supercore.superexec.executor.factory``, called by
    ``get_executor``.
    """
    factory: Any = importlib.import_module("flwr.supercore.superexec.executor.factory")
    check_cluster_hook(factory)
    factory.create_incluster_kubernetes_clients = lambda: (client, client)


def check_cluster_hook(factory: Any) -> None:
    """Raise ``HookError`` unless Flower's factory still makes the executor with that function's clients."""
    name = "create_incluster_kubernetes_clients"
    code = getattr(getattr(factory, "get_executor", None), "__code__", None)
    if not hasattr(factory, name) or name not in getattr(code, "co_names", ()):
        raise HookError(
            f"the hook {name} is gone from Flower's get_executor: "
            "task pods would belong to nobody and be open to what their pod-spec closes"
        )


def install_bundle_check(task: str) -> None:
    """Refuse a Flower App Bundle that carries code, in a task process.

    Hook: the name ``install_from_fab`` in the modules ``SERVERAPP_TASK``, ``CLIENTAPP_TASK`` and ``SIMULATION_TASK``,
    called with the bundle's bytes before anything is loaded.
    """
    module: Any = importlib.import_module(task)
    check_bundle_hook(module)
    original = module.install_from_fab

    def install_from_fab(fab_file: bytes, *args: Any, **options: Any) -> Path:
        check_bundle(fab_file)
        # It prints where it put the bundle, into a log whose lines may be of JSON.
        with contextlib.redirect_stdout(io.StringIO()):
            path: Path = original(fab_file, *args, **options)
        return path

    module.install_from_fab = install_from_fab


def check_bundle_hook(module: Any) -> None:
    """Raise ``HookError`` unless the task process still installs bundles through ``install_from_fab``."""
    function = getattr(module, "install_from_fab", None)
    first = next(iter(inspect.signature(function).parameters), None) if function else None
    if first != "fab_file":
        raise HookError(
            f"the hook install_from_fab(fab_file) is gone from {module.__name__}: "
            "a bundle's code could not be refused"
        )


def set_chunk_size(chunk_bytes: int) -> None:
    """Cut the arrays of the messages that this process makes into chunks of at most ``chunk_bytes``.

    Hook: the constant ``FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE`` in ``flwr.app.message.array``, read by
    ``Array.slice_array`` when a message is sent. Each chunk is one HTTP request, which must end within 30 s.
    """
    array: Any = importlib.import_module("flwr.app.message.array")
    check_chunk_hook(array)
    if chunk_bytes < 1:
        raise ConfigError(f"a chunk of {chunk_bytes} bytes cannot be sent; set chunk-bytes above 0")
    array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = chunk_bytes


def check_chunk_hook(array: Any) -> None:
    """Raise ``HookError`` unless ``Array.slice_array`` still reads the chunk size from its module."""
    name = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
    code = getattr(getattr(getattr(array, "Array", None), "slice_array", None), "__code__", None)
    if not isinstance(getattr(array, name, None), int) or name not in getattr(code, "co_names", ()):
        raise HookError(
            f"the hook {name} is gone from Flower's Array.slice_array: "
            "messages cannot be cut for a slow link"
        )


def set_concurrency(requests: int) -> None:
    """Let this process have at most ``requests`` chunks on their way at once, in each direction.

    Hook: the keyword defaults of ``push_object_contents_from_iterable`` and ``pull_objects`` in
    ``flwr.supercore.inflatable.inflatable_utils``, with which the SuperNode calls them.
    """
    transfer: Any = importlib.import_module("flwr.supercore.inflatable.inflatable_utils")
    check_concurrency_hook(transfer)
    for function, keyword in _CONCURRENCY.items():
        getattr(transfer, function).__kwdefaults__[keyword] = requests


_CONCURRENCY = {
    "push_object_contents_from_iterable": "max_concurrent_pushes",
    "pull_objects": "max_concurrent_pulls",
}


def check_concurrency_hook(transfer: Any) -> None:
    """Raise ``HookError`` unless Flower still takes its concurrency from those defaults."""
    for function, keyword in _CONCURRENCY.items():
        defaults = getattr(getattr(transfer, function, None), "__kwdefaults__", None) or {}
        if not isinstance(defaults.get(keyword), int):
            raise HookError(
                f"the hook {function}(*, {keyword}) is gone from Flower: "
                "chunks would share a slow link and time out"
            )


def check_bundle(fab: bytes) -> None:
    """Raise ``ConfigError`` when a bundle carries anything but the run's configuration.

    What runs at a site is what is installed there; a bundle that brings files of its own would shadow it.
    """
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        names = {name for name in archive.namelist() if not name.startswith(".info/")}
        if names != {"pyproject.toml"}:
            extra = ", ".join(sorted(names - {"pyproject.toml"})[:3]) or "no pyproject.toml"
            raise ConfigError(
                f"the run's bundle carries {extra}; a site runs only the code installed there. "
                "Build the bundle with fab-include = ['pyproject.toml']"
            )
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    components = project.get("tool", {}).get("flwr", {}).get("app", {}).get("components")
    if components != COMPONENTS:
        raise ConfigError(
            f"the run's bundle names the components {components}; this site runs {COMPONENTS} only"
        )
