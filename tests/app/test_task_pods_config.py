"""The file that tells Flower's Kubernetes executor what a task's pod is: what is wrong in it is named at the start."""

from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.superexec.executor import factory

from app import task_pods
from app.task_pods import numeric, read
from certs.errors import ConfigError, ConnectionRefusedByFleetError
from tests.k8s.executor import CONFIG, written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"namespace": None}, "lacks 'namespace'"),
        ({"image": None}, "lacks 'image'"),
        ({"active-pod-budget": None}, "lacks 'active-pod-budget'"),
        ({"runtime-class-name": "nvidia"}, "has the key 'runtime-class-name', which is unknown"),
        ({"warm-executor-pools": []}, "has the key 'warm-executor-pools', which is unknown"),
        ({"active-pod-budget": "1"}, "active-pod-budget must be a number, not '1'"),
        ({"active-pod-budget": True}, "active-pod-budget must be a number, not True"),
        ({"active-pod-budget": 0}, "active-pod-budget must be 1 or more"),
        ({"labels": ["a"]}, "labels must be a map"),
        ({"volumes": {}}, "volumes must be a list"),
        ({"image": 3}, "image must be a text"),
        ({"pod-spec": ["a"]}, "pod-spec is a map with none but"),
        ({"pod-spec": {"hostNetwork": True}}, "not 'hostNetwork'"),
        ({"pod-spec": {"serviceAccountName": "x"}}, "not 'serviceAccountName'"),
        ({"env": []}, "env must name VLAFLEET_IDENTITY"),
        (
            {"env": [*CONFIG["env"], {"name": "VLAFLEET_TRAINER", "value": "/tmp/t"}]},
            "env names VLAFLEET_TRAINER",
        ),
    ],
)
def test_a_configuration_that_is_wrong_is_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words) as raised:
        read(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "file does not exist"),
        ("", "file must not be empty"),
        ("- a", "root must be a mapping"),
        ("a: [", "file must contain valid YAML"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "executor.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"{path} cannot be used: {words}"):
        read(path)


def test_the_keys_are_flowers() -> None:
    """A key that Flower's factory does not read would be without effect."""
    read_by_flower = {*factory._KUBERNETES_CONFIG_FIELD_MAP, "namespace", "image"}
    assert set(task_pods._KEYS) <= read_by_flower


def test_a_pod_is_given_an_ip_address() -> None:
    assert numeric("localhost:9094") in {"127.0.0.1:9094", "[::1]:9094"}
    assert numeric("10.96.3.7:9094") == "10.96.3.7:9094"
    assert numeric("[fd00::7]:9094") == "[fd00::7]:9094"
    for wrong in ("supernode.invalid:9094", "10.96.3.7", "10.96.3.7:port"):
        with pytest.raises(ConnectionRefusedByFleetError, match="has no IP address"):
            numeric(wrong)
