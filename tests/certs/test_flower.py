"""The contract with Flower: each hook fails with a sentence that names it when Flower changes underneath."""

import importlib
import io
import types
import zipfile
from typing import Any

import pytest

from certs.errors import CertificateError, ConfigError
from certs.flower import (
    CLIENTAPP_TASK,
    COMPONENTS,
    SERVERAPP_TASK,
    SIMULATION_TASK,
    HookError,
    check_bundle,
    check_bundle_hook,
    check_chunk_hook,
    check_client_hook,
    check_cluster_hook,
    check_command_hook,
    check_concurrency_hook,
    install_bundle_check,
    set_chunk_size,
    set_concurrency,
)


def test_client_hook_holds() -> None:
    from flwr.supercore.protobuf.client import ProtobufClient

    check_client_hook(ProtobufClient)
    client = ProtobufClient("https://localhost:1")
    assert client._client.event_hooks == {"request": [], "response": []}, (
        "the hook ProtobufClient._client is no longer an httpx.Client with event hooks"
    )


def test_every_flower_client_goes_through_the_hook() -> None:
    """SuperNode, SuperExec, ServerApp, ClientApp and the flwr command connect through ``ProtobufClient``."""
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.protobuf.client import ProtobufClient
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient

    for client in (ControlHttpClient, RuntimeHttpClient, FleetHttpClient):
        assert issubclass(client, ProtobufClient), (
            f"the hook ProtobufClient no longer covers {client.__name__}"
        )
        assert client.__init__ is ProtobufClient.__init__, (
            f"{client.__name__} has a constructor of its own"
        )


def test_client_hook_names_itself() -> None:
    class Changed:
        def __init__(self, base_url: str) -> None:
            self.base_url = base_url

    with pytest.raises(
        HookError, match=r"the hook ProtobufClient\.__init__\(base_url, \*, verify\) is gone"
    ):
        check_client_hook(Changed)


def test_plain_http_is_refused_at_the_client(
    identity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.supercore.protobuf.client import ProtobufClient

    from certs.flower import install_client
    from certs.roles import Role

    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)
    install_client(identity(Role.OPERATOR, "admin"))
    with pytest.raises(CertificateError, match="is not https"):
        ProtobufClient("http://localhost:1")


def test_clients_present_the_certificate_that_the_files_hold_now(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of Flower's lives as long as its process, its certificate a week."""
    from flwr.supercore.protobuf.client import ProtobufClient

    from certs.flower import install_client
    from certs.roles import Role
    from tests.renewing import Fleet
    from tests.serving import renew, serving

    fleet = Fleet.make(tmp_path)
    site = fleet.identity(Role.SITE, "site-a")
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)
    install_client(site)
    with serving(fleet.identity(Role.SUPERLINK, "superlink")) as running:
        http = ProtobufClient(running.url)._client
        with http:
            answers = [http.get(f"{running.url}/echo").text]
            renewed = renew(site, fleet.authority)
            # What is open stays; the server ends it when the old certificate is about to end.
            answers.append(http.get(f"{running.url}/echo", headers={"connection": "close"}).text)
            answers.append(http.get(f"{running.url}/echo").text)
    old, new = f"{site.peer.serial:x} 0", f"{renewed.serial_number:x} 0"
    assert answers == [old, old, new]


def test_command_hook_holds() -> None:
    from flwr.supercore import constant
    from flwr.supercore.superexec.executor import kubernetes_executor, subprocess_executor

    check_command_hook(constant, subprocess_executor, kubernetes_executor)


@pytest.mark.parametrize("change", ["gone", "copied", "renamed"])
def test_command_hook_names_itself(change: str) -> None:
    types_ = types.SimpleNamespace(SERVER_APP="s", CLIENT_APP="c", SIMULATION="m")
    table = {"s": "flwr-serverapp", "c": "flwr-clientapp", "m": "flwr-simulation"}
    constant = types.SimpleNamespace(TaskType=types_, TASK_TYPE_TO_COMMAND=table)
    subprocess = types.SimpleNamespace(TASK_TYPE_TO_COMMAND=table)
    executor = types.SimpleNamespace(TASK_TYPE_TO_COMMAND=table)
    check_command_hook(constant, subprocess, executor)
    if change == "gone":
        del constant.TASK_TYPE_TO_COMMAND
    elif change == "copied":
        executor.TASK_TYPE_TO_COMMAND = dict(table)
    else:
        del table["c"]
    with pytest.raises(HookError, match="the hook TASK_TYPE_TO_COMMAND is gone"):
        check_command_hook(constant, subprocess, executor)


def test_cluster_hook_holds() -> None:
    """Flower's executor gets its client from the factory, and asks it for what ``Cluster`` offers and no more."""
    from flwr.supercore.superexec.executor import factory, kubernetes_executor

    from app.task_pods import Cluster

    check_cluster_hook(factory)
    asked = {name for name in vars(kubernetes_executor.KubernetesClient) if name[0] != "_"}
    # Of warm pods, which no ClientApp is given.
    assert asked - set(vars(Cluster)) == {"patch_namespaced_pod", "connect_get_namespaced_pod_exec"}


@pytest.mark.parametrize("change", ["gone", "not called"])
def test_cluster_hook_names_itself(change: str) -> None:
    def get_executor() -> object:
        return factory.create_incluster_kubernetes_clients()

    factory = types.SimpleNamespace(
        create_incluster_kubernetes_clients=lambda: None, get_executor=get_executor
    )
    check_cluster_hook(factory)
    if change == "gone":
        del factory.create_incluster_kubernetes_clients
    else:
        factory.get_executor = lambda: None
    with pytest.raises(HookError, match="hook create_incluster_kubernetes_clients is gone"):
        check_cluster_hook(factory)


def test_bundle_hook_holds() -> None:
    for task in (SERVERAPP_TASK, CLIENTAPP_TASK, SIMULATION_TASK):
        check_bundle_hook(importlib.import_module(task))


def test_bundle_check_stands_in_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(CLIENTAPP_TASK)
    monkeypatch.setattr(module, "install_from_fab", module.install_from_fab)
    install_bundle_check(CLIENTAPP_TASK)
    with pytest.raises(ConfigError, match=r"carries evil\.py"):
        module.install_from_fab(bundle(**{"evil.py": ""}), skip_prompt=True)


def test_bundle_hook_names_itself() -> None:
    module = types.ModuleType("flwr.somewhere")
    with pytest.raises(
        HookError, match=r"the hook install_from_fab\(fab_file\) is gone from flwr\.somewhere"
    ):
        check_bundle_hook(module)


def test_chunk_size_cuts_what_flower_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The objects that Flower pushes for a message: all its chunks, each no larger than was set."""
    from flwr.app import Array, ArrayRecord, RecordDict
    from flwr.app.message import array
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    name = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
    monkeypatch.setattr(array, name, getattr(array, name))
    set_chunk_size(1000)
    data = bytes(range(256)) * 10
    records = RecordDict(
        {"model": ArrayRecord({"flat": Array("uint8", (len(data),), "raw", data)})}
    )
    objects = get_all_nested_objects(records).values()
    chunks = [o.deflate() for o in objects if type(o).__name__ == "ArrayChunk"]
    # Flower puts a header of some 30 bytes before each.
    assert sorted(len(chunk) // 100 for chunk in chunks) == [5, 10, 10]
    assert data[:1000] in b"".join(chunks)


def test_chunk_size_is_positive() -> None:
    with pytest.raises(ConfigError, match="a chunk of 0 bytes cannot be sent"):
        set_chunk_size(0)


@pytest.mark.parametrize("change", ["constant gone", "method gone", "not read"])
def test_chunk_hook_names_itself(change: str) -> None:
    class Array:
        def slice_array(self) -> Any:
            return FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE  # type: ignore[name-defined]  # noqa: F821

    class Other:
        def slice_array(self) -> int:
            return 5242880

    module = types.SimpleNamespace(Array=Array, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE=5242880)
    check_chunk_hook(module)
    if change == "constant gone":
        del module.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    else:
        module.Array = Other if change == "not read" else object
    with pytest.raises(
        HookError, match="the hook FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE is gone from Flower's Array"
    ):
        check_chunk_hook(module)


def test_concurrency_bounds_what_the_supernode_has_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in the two functions as the SuperNode has them, called as it calls them."""
    import os
    import threading

    from flwr.supercore.inflatable import inflatable_utils
    from flwr.supernode import start_client_internal

    for function in ("push_object_contents_from_iterable", "pull_objects"):
        original = getattr(inflatable_utils, function)
        monkeypatch.setattr(original, "__kwdefaults__", dict(original.__kwdefaults__))
    # Flower starts no more requests than it has cores.
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    supernode: Any = start_client_internal
    names = [str(number) for number in range(12)]
    for concurrency in (1, 3):
        set_concurrency(concurrency)
        for move in ("push", "pull"):
            lock, together = threading.Lock(), threading.Barrier(concurrency)
            now, most = 0, 0

            def request(*_: object, lock: Any = lock, together: Any = together) -> bytes:
                nonlocal now, most
                with lock:
                    now += 1
                    most = max(most, now)
                together.wait(10)  # BrokenBarrierError unless so many are on their way at once
                with lock:
                    now -= 1
                return b"content"

            if move == "push":
                supernode.push_object_contents_from_iterable(
                    [(name, b"") for name in names], push_object_fn=request
                )
            else:
                supernode.pull_objects(names, pull_object_fn=request)
            assert most == concurrency, move


@pytest.mark.parametrize("change", ["gone", "renamed", "positional"])
def test_concurrency_hook_names_itself(change: str) -> None:
    def push(contents: Any, *, max_concurrent_pushes: int = 2) -> None: ...
    def pull(ids: Any, *, max_concurrent_pulls: int = 2) -> None: ...
    def renamed(ids: Any, *, workers: int = 2) -> None: ...
    def positional(ids: Any, max_concurrent_pulls: int = 2) -> None: ...

    module = types.SimpleNamespace(push_object_contents_from_iterable=push, pull_objects=pull)
    check_concurrency_hook(module)
    if change == "gone":
        del module.pull_objects
    else:
        module.pull_objects = renamed if change == "renamed" else positional
    with pytest.raises(
        HookError, match=r"the hook pull_objects\(\*, max_concurrent_pulls\) is gone from Flower"
    ):
        check_concurrency_hook(module)


def test_superlink_composition_holds() -> None:
    """``superlink.server`` builds Flower's start-up configuration by keyword; every field must still be there."""
    import dataclasses
    import inspect

    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    fields = {field.name for field in dataclasses.fields(SuperLinkLifespanConfig)}
    assert fields == {
        *(
            "host",
            "port",
            "database",
            "enable_supernode_auth",
            "isolation",
            "authn_plugin",
            "insecure",
        ),
        *(
            "certificates",
            "ssl_ca_certfile",
            "ssl_certfile",
            "ssl_keyfile",
            "superexec_auth_secret",
        ),
        *("event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider"),
        *(
            "control_address",
            "health_server_address",
            "fleet_api_type",
            "fleet_api_address",
            "simulation",
        ),
        "runtime_dependency_install",
    }, (
        "the hook SuperLinkLifespanConfig changed: superlink/server.py must set every field knowingly"
    )
    assert list(inspect.signature(create_app).parameters) == [
        "config",
        "superlink_lifespan_class",
    ], "the hook flwr.superlink.main.create_app changed"


def test_supernode_composition_holds() -> None:
    """``supernode.node`` starts Flower's worker and Runtime API by keyword."""
    import inspect

    from flwr.supernode.main import create_app
    from flwr.supernode.start_client_internal import start_client_internal

    used = {"state_factory", "server_address", "node_config", "root_certificates", "insecure"}
    used |= {"authentication_keys", "isolation", "runtime_api_address"}
    assert used <= set(inspect.signature(start_client_internal).parameters), (
        "the hook start_client_internal changed: supernode/node.py cannot start the worker"
    )
    assert "state_factory" in inspect.signature(create_app).parameters, (
        "the hook flwr.supernode.main.create_app changed"
    )


def test_guard_reads_the_header_flower_sends() -> None:
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

    from superlink.server import _PUBLIC_KEY_HEADER

    assert FLEET_HTTP_PUBLIC_KEY_HEADER.encode() == _PUBLIC_KEY_HEADER, (
        "the hook FLEET_HTTP_PUBLIC_KEY_HEADER changed: the guard would not see the SuperNode's key"
    )


def test_superexec_composition_holds() -> None:
    import inspect

    from flwr.supercore.superexec.run_superexec import run_superexec

    used = {
        "runtime_api_address",
        "insecure",
        "root_certificates_path",
        "runtime_dependency_install",
        "executor_type",
        "executor_config",
    }
    assert used <= set(inspect.signature(run_superexec).parameters), (
        "the hook run_superexec changed: app/superexec.py cannot start it"
    )


def bundle(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {".info/CONTENT": "", **files}.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def project(**components: str) -> str:
    lines = "\n".join(f'{key} = "{value}"' for key, value in components.items())
    return f"[tool.flwr.app.components]\n{lines}\n"


def test_a_bundle_of_configuration_passes() -> None:
    check_bundle(bundle(**{"pyproject.toml": project(**COMPONENTS)}))


@pytest.mark.parametrize("name", ["app/server_app.py", "torch.py", "app/x.so", "sitecustomize.py"])
def test_a_bundle_with_code_is_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"carries {name}; a site runs only the code installed there"
    ):
        check_bundle(bundle(**{"pyproject.toml": project(**COMPONENTS), name: "x = 1"}))


def test_a_bundle_naming_other_code_is_refused() -> None:
    components = {**COMPONENTS, "clientapp": "os:abort"}
    with pytest.raises(ConfigError, match="names the components"):
        check_bundle(bundle(**{"pyproject.toml": project(**components)}))


def test_the_projects_own_bundle_passes() -> None:
    from pathlib import Path

    from flwr.cli.build import build_fab_from_disk

    check_bundle(build_fab_from_disk(Path(__file__).parents[2]))
