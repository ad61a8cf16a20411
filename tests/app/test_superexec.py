"""SuperExec's own start: what it refuses, and a task's process in a pod of its own."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from app import superexec
from certs import logs
from certs.errors import ConfigError, ConnectionRefusedByFleetError, FleetError, ToolError
from certs.identity import Identity, identity_directory
from certs.roles import Role
from tests.conftest import Vlafleet
from tests.k8s.executor import CONFIG


@pytest.mark.parametrize(
    ("holder", "address", "content", "kind", "words"),
    [
        ("superlink", "localhost:9", CONFIG, ConfigError, "is for a site's SuperExec"),
        ("site-a", "nowhere.invalid:9", CONFIG, ConnectionRefusedByFleetError, "no IP address"),
        ("site-a", "localhost:9", None, ConfigError, "cannot be used: file does not exist"),
        ("site-a", "localhost:9", {**CONFIG, "gpu": 1}, ConfigError, "the key 'gpu', which is unkn"),
        ("site-a", "localhost:9", CONFIG, ToolError, "needs a pod with a service account"),
    ],
)  # fmt: skip
def test_what_keeps_the_kubernetes_executor_from_starting_is_one_sentence(
    pki: Path,
    vlafleet: Vlafleet,
    tmp_path: Path,
    holder: str,
    address: str,
    content: dict[str, object] | None,
    kind: type[FleetError],
    words: str,
) -> None:
    file = tmp_path / "executor.yaml"
    if content is not None:
        file.write_text(yaml.safe_dump(content))
    identity = identity_directory(pki, Role.SUPEREXEC, holder)
    done = vlafleet(
        *("superexec", "--identity", identity, "--address", address, "--kubernetes", file)
    )
    assert done.returncode == kind.exit_code, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("parent", [0, 1, 4711])
def test_a_task_ends_with_a_parent_that_is_a_superexec(
    identity: Callable[[Role, str], Identity], monkeypatch: pytest.MonkeyPatch, parent: int
) -> None:
    """In a pod of its own it has none: the container's runtime, outside, is nobody whose end it waits for."""
    asked: list[int] = []
    own = identity(Role.SUPEREXEC, "site-a")
    monkeypatch.setenv("VLAFLEET_IDENTITY", str(own.directory))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setattr(os, "getppid", lambda: parent)
    monkeypatch.setattr(superexec, "end_with_parent", asked.append)
    monkeypatch.setattr(superexec, "install_client", lambda _: None)
    monkeypatch.setattr(logs, "configure", lambda: None)
    monkeypatch.setattr(logs, "_bound", {})
    before = dict(os.environ)
    try:
        superexec._prepare_task()
        # A pod inherits nothing of it.
        assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
        assert os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert asked == ([signal.SIGKILL] if parent else [])
