"""Upgrades keep volumes, keys and names, and change nothing that the API server holds to be fixed."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import previous
from tests.k8s.charts import CHARTS, ROOT, Manifest, ci_values
from tests.k8s.mutations import GONE, Fault
from tests.k8s.renders import EVERY_RENDER, rendered
from tests.k8s.test_rendered import BASES
from tests.k8s.upgrades import Key, key, lost, refused
from tests.k8s.upgrading import Release, cluster, next_version, upgrade


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where Helm asks for the version of Kubernetes."""
    with cluster() as address:
        yield address


@pytest.mark.parametrize(
    ("chart", "path"),
    [
        pytest.param(chart, path, id=path.stem)
        for chart in CHARTS
        for path in previous.releases(chart)
    ],
)
def test_a_released_version_upgrades_to_this_one(
    chart: str, path: Path, address: str, tmp_path: Path
) -> None:
    values, before = previous.read(path)
    after = upgrade(ROOT / "k8s" / chart, values, tmp_path, address).manifests
    assert list(refused(before, after)) == []
    assert list(lost(before, after)) == []


@pytest.mark.parametrize("chart", CHARTS)
def test_there_is_a_released_version_to_upgrade_from(chart: str) -> None:
    assert {path.name.split("-", 2)[2] for path in previous.releases(chart)} >= {
        f"{name}.yaml" for name in previous.SHOWN[chart]
    }


@pytest.fixture(scope="module")
def second(
    address: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], Release]:
    """Return the second revision of a release with a file of values; each is made once."""

    @functools.cache
    def make(chart: str, path: Path) -> Release:
        scratch = tmp_path_factory.mktemp("upgrade")
        return upgrade(ROOT / "k8s" / chart, rendered(chart, path).values, scratch, address)

    return make


@EVERY_RENDER
def test_the_next_version_keeps_what_lives(
    chart: str, path: Path, address: str, tmp_path: Path
) -> None:
    """Another version label, other images: no fixed field (a Job's pod, a selector) may bear either."""
    before = rendered(chart, path)
    after = upgrade(next_version(chart, tmp_path), before.values, tmp_path, address).manifests
    assert list(refused(before.manifests, after)) == []
    assert list(lost(before.manifests, after)) == []
    labels = {one["metadata"]["labels"]["app.kubernetes.io/version"] for one in after}
    assert labels == {"99.0.0"}


@EVERY_RENDER
def test_an_upgrade_to_the_same_thing_changes_jobs_alone(
    chart: str, path: Path, second: Callable[[str, Path], Release]
) -> None:
    def lasting(manifests: list[Manifest]) -> dict[Key, Manifest]:
        # A task's pod is Flower's, and in no release.
        return {key(one): one for one in manifests if one["kind"] not in ("Job", "Pod")}

    assert lasting(second(chart, path).manifests) == lasting(rendered(chart, path).manifests)


@EVERY_RENDER
def test_values_can_be_changed_in_a_release(
    chart: str, path: Path, second: Callable[[str, Path], Release]
) -> None:
    """From any of the files of values to any other: nothing that is in both is fixed and different."""
    after = second(chart, path).manifests
    for other in ci_values(chart):
        found = [
            wrong
            for wrong in refused(rendered(chart, other).manifests, after)
            # What an operator asks for, and is refused by Kubernetes in words: another class, a smaller size.
            if "storageClassName" not in wrong and "shrink" not in wrong
        ]
        assert found == [], other.name


@EVERY_RENDER
def test_the_notes_tell_the_next_command(
    chart: str, path: Path, second: Callable[[str, Path], Release]
) -> None:
    assert "kubectl" in second(chart, path).notes


POD = "spec.template.spec"
SUPERLINK = "StatefulSet/fed-superlink"


@pytest.mark.parametrize(
    ("check", "fault", "says"),
    [
        (refused, Fault(SUPERLINK, "spec.selector.matchLabels.x", "y"), "selector is fixed"),
        (refused, Fault(SUPERLINK, "spec.serviceName", "other"), "serviceName is fixed"),
        (refused, Fault(SUPERLINK, "spec.volumeClaimTemplates", []), "ClaimTemplates is fixed"),
        (refused, Fault("Job/vlafleet-lab-7-join-1", f"{POD}.x", "y"), "template is fixed"),
        (
            refused,
            Fault("PersistentVolumeClaim/fed-superlink", "spec.storageClassName", "fast"),
            "storageClassName is fixed",
        ),
        (
            refused,
            Fault("PersistentVolumeClaim/fed-superlink", "spec.resources.requests.storage", "1Gi"),
            "cannot shrink",
        ),
        (refused, Fault("Service/fed-superlink", "spec.clusterIP", "None"), "headless"),
        (refused, Fault("RoleBinding/fed-enrolment", "roleRef.name", "x"), "roleRef is fixed"),
        (lost, Fault(SUPERLINK, "metadata.name", "superlink"), "fed-superlink is gone"),
        (lost, Fault("PersistentVolumeClaim/fed-enrolment", ""), "fed-enrolment is gone"),
        (lost, Fault("Service/fed-superlink", "metadata.name", "x"), "fed-superlink is gone"),
        (lost, Fault("Service/fed-superlink", "spec.ports.0.port", 1), "port tls moves from 9092"),
        (
            lost,
            Fault("PersistentVolumeClaim/fed-superlink", "metadata.annotations", {}),
            "would go with the release",
        ),
        (
            lost,
            Fault("StatefulSet/vlafleet-lab-7-app", f"{POD}.containers.0.volumeMounts.0.subPath"),
            "now has {('vlafleet-lab-7-state', '')}",
        ),
        (
            lost,
            Fault("StatefulSet/vlafleet-lab-7-app", f"{POD}.volumes.secret.secret.secretName", "x"),
            "vlafleet-lab-7-superexec is read by nobody",
        ),
    ],
    ids=lambda value: f"{value.target}-{value.path}" if isinstance(value, Fault) else None,
)
def test_each_rule_sees_the_change_that_it_is_there_for(
    check: Any, fault: Fault, says: str
) -> None:
    base = "fed" if "/fed-" in fault.target else "vlafleet-lab-7"
    before = rendered(*BASES[base]).manifests
    found = list(check(before, fault.put_into(before)))
    assert any(says in wrong for wrong in found), found
    assert list(check(before, before)) == []


def test_what_may_change_is_not_refused() -> None:
    before = rendered(*BASES["fed"]).manifests
    for fault in (
        Fault(SUPERLINK, f"{POD}.containers.0.image", "vlafleet-superlink:2"),
        Fault("PersistentVolumeClaim/fed-superlink", "spec.resources.requests.storage", "1Ti"),
        Fault("Service/fed-superlink", "spec.type", "LoadBalancer"),
        Fault("Role/fed-enrolment", "rules", []),
        Fault("Role/fed-enrolment", "", GONE),
    ):
        after = fault.put_into(before)
        assert [*refused(before, after), *lost(before, after)] == []
