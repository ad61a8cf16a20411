"""What single values do to the objects: GPUs, images, scheduling; and that no value does nothing."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.charts import (
    CHARTS,
    ROOT,
    Manifest,
    ci_values,
    objects_in,
    succeeded,
    template,
)
from tests.k8s.objects import Template, pod_templates
from tests.k8s.renders import EVERY_RENDER, rendered
from tests.k8s.task_pods import task_pods
from tests.k8s.test_schemas import CUSTOM, VERSIONS, unread, wrong
from tests.k8s.test_values import DIGEST, SOUND


def made(chart: str, **values: Any) -> list[Manifest]:
    """Return what a chart makes of sound values and these, with the pods of tasks."""
    manifests = objects_in(succeeded(template(chart, {**SOUND[chart], **values})))
    return [*manifests, *task_pods(manifests)]


def pod(manifests: list[Manifest], name: str) -> Template:
    """Return the one pod whose name ends so."""
    (found,) = (one for one in pod_templates(manifests) if one.name.endswith(name))
    return found


def device(manifests: list[Manifest]) -> str:
    """Return what the SuperNode is told that its app trains on."""
    arguments = pod(manifests, "-supernode").spec["containers"][0]["args"]
    found: str = arguments[arguments.index("--device") + 1]
    return found


def gpus(found: Template) -> dict[str, Any]:
    """Return the devices that a pod is given."""
    return {
        name: amount
        for container in found.all_containers
        for name, amount in container["resources"]["limits"].items()
        if "/" in name
    }


@pytest.mark.parametrize(
    ("gpu", "expected", "trains_on"),
    [
        ({}, {"nvidia.com/gpu": 1}, "cuda"),
        ({"count": 2}, {"nvidia.com/gpu": 2}, "cuda"),
        ({"resource": "nvidia.com/mig-3g.40gb"}, {"nvidia.com/mig-3g.40gb": 1}, "cuda"),
        ({"count": 0}, {}, "cpu"),
    ],
    ids=["default", "two", "mig", "none"],
)
def test_the_app_is_given_the_gpus_that_the_supernode_knows_of(
    gpu: dict[str, Any], expected: dict[str, int], trains_on: str
) -> None:
    manifests = made("site", app={"gpu": gpu})
    assert gpus(pod(manifests, "-app")) == expected
    assert device(manifests) == trains_on
    others = [one for one in pod_templates(manifests) if not one.name.endswith("-app")]
    assert [one.name for one in others if gpus(one)] == []


def test_the_runtime_class_is_the_apps_alone() -> None:
    manifests = made("site", app={"gpu": {"runtimeClassName": "nvidia"}})
    having = {one.name for one in pod_templates(manifests) if "runtimeClassName" in one.spec}
    assert having == {"vlafleet-lab-7-app"}


def test_with_a_pod_for_each_task_the_gpu_is_the_tasks() -> None:
    manifests = made("site", app={"executor": {"type": "kubernetes", "namespace": "tasks"}})
    assert gpus(pod(manifests, "-first")) == {"nvidia.com/gpu": "1"}
    assert gpus(pod(manifests, "-app")) == {}
    assert device(manifests) == "cuda"


def test_the_serverapp_has_a_gpu_where_it_is_asked_for_one() -> None:
    assert gpus(pod(made("superlink"), "-superexec")) == {}
    asked = made("superlink", superexec={"gpu": {"count": 1, "runtimeClassName": "nvidia"}})
    assert gpus(pod(asked, "-superexec")) == {"nvidia.com/gpu": 1}
    assert pod(asked, "-superexec").spec["runtimeClassName"] == "nvidia"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "vlafleet-app:0.1.0"),
        (
            {"imageRegistry": "mirror.example:5000/fleet"},
            "mirror.example:5000/fleet/vlafleet-app:0.1.0",
        ),
        ({"app": {"image": {"tag": "0.2.0"}}}, "vlafleet-app:0.2.0"),
        ({"app": {"image": {"digest": DIGEST}}}, f"vlafleet-app@{DIGEST}"),
        ({"app": {"image": {"repository": "ours/app"}}}, "ours/app:0.1.0"),
    ],
    ids=["default", "registry", "tag", "digest", "repository"],
)
def test_an_image_is_named_by_tag_or_digest(values: dict[str, Any], expected: str) -> None:
    found = pod(made("site", **values), "-app")
    assert {container["image"] for container in found.all_containers} == {expected}


def test_the_app_sees_the_recordings_and_the_supernode_none() -> None:
    """One dataset, as the SuperNode tells it and as the app finds it, read-only, in each way to come by it."""
    for dataset, told in (
        ({"existingClaim": "recordings", "subPath": "so101"}, "/data"),
        ({"hostPath": "/srv/recordings"}, "/data"),
        ({"hub": "acme/so101"}, "/data"),
        ({"existingClaim": "recordings", "episodes": "0:50"}, "/data#episodes=0:50"),
    ):
        manifests = made("site", dataset=dataset)
        app, supernode = pod(manifests, "-app"), pod(manifests, "-supernode")
        arguments = supernode.spec["containers"][0]["args"]
        assert arguments[arguments.index("--dataset") + 1] == told
        (mount,) = (
            one for one in app.spec["containers"][0]["volumeMounts"] if one["mountPath"] == "/data"
        )
        assert mount["readOnly"] is True
        assert mount["name"] not in [one["name"] for one in supernode.spec["volumes"]]


def leaves(values: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of values that are no maps."""
    if not isinstance(values, dict) or not values:
        return [prefix]
    return [path for key, value in values.items() for path in leaves(value, (*prefix, key))]


def without(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return values without one of them."""
    rest = copy.deepcopy(values)
    place = rest
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return rest


@pytest.mark.parametrize("chart", CHARTS)
def test_no_value_is_ignored(chart: str) -> None:
    """Each value that some file gives otherwise than the default makes a difference there: in objects or in words."""
    defaults = yaml.safe_load((ROOT / "k8s" / chart / "values.yaml").read_text())
    ignored: dict[tuple[str, ...], bool] = {}
    for path in ci_values(chart):
        sound = rendered(chart, path)
        for leaf in leaves(sound.values):
            if ignored.get(leaf, True) and _at(sound.values, leaf) != _at(defaults, leaf):
                done = template(chart, without(sound.values, leaf))
                ignored[leaf] = not done.returncode and done.stdout == sound.text
    assert ignored
    nothing = sorted(".".join(leaf) for leaf in ignored if ignored[leaf])
    # Helm's own, for a chart that is part of another.
    assert [name for name in nothing if not name.startswith("global.")] == []


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        values = values.get(step) if isinstance(values, dict) else None
    return values


# The keys under which an operator names something in the cluster.
NAMED = {
    *("existingClaim", "existingSecret", "superexecSecret", "monitorSecret", "key"),
    *("priorityClassName", "runtimeClassName", "storageClass"),
}


def numbered(values: Any, years: Iterator[int]) -> Any:
    """Return values with each such name as another year."""
    if not isinstance(values, dict):
        return values
    return {
        key: str(next(years)) if key in NAMED and value else numbered(value, years)
        for key, value in values.items()
    }


@EVERY_RENDER
def test_a_name_that_looks_like_a_number_stays_a_text(chart: str, path: Path) -> None:
    values = numbered(rendered(chart, path).values, itertools.count(2024))
    manifests = objects_in(succeeded(template(chart, values)))
    for one in manifests:
        if one["apiVersion"] in CUSTOM:
            given, known = unread(one)
            assert known == given
        else:
            assert wrong(one, VERSIONS[-1]) is None
