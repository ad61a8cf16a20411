"""Two releases beside each other, and names as long as they may be."""

import itertools
from typing import Any

import pytest

from tests.k8s.charts import CHARTS, Manifest, render
from tests.k8s.object_checks import names, selectors
from tests.k8s.policies import Network, pod_peers
from tests.k8s.renders import Rendered
from tests.k8s.task_pods import task_pods
from tests.k8s.test_rendered import CHECKS
from tests.k8s.test_values import SOUND
from tests.k8s.upgrades import key

EXECUTOR = {"app": {"executor": {"type": "kubernetes", "namespace": "tasks"}}}


def made(chart: str, release: str, values: dict[str, Any]) -> list[Manifest]:
    """Return what a release of a chart makes, with the pods of tasks."""
    manifests = render(chart, values, release=release)
    return [*manifests, *task_pods(manifests)]


@pytest.mark.parametrize(
    ("chart", "extra"),
    [("superlink", {}), ("site", {}), ("site", EXECUTOR)],
    ids=["superlink", "site", "executor"],
)
def test_two_releases_in_one_namespace_have_nothing_in_common(
    chart: str, extra: dict[str, Any]
) -> None:
    values = {**SOUND[chart], **extra}
    one, other = made(chart, "one", values), made(chart, "one-b", values)
    # A task's pod has a name that Flower makes anew each time.
    assert not {key(found) for found in one if found["kind"] != "Pod"} & {
        key(found) for found in other
    }
    assert list(selectors(Rendered(values, [*one, *_renamed(other)]))) == []
    ours, theirs = pod_peers(one), pod_peers(other)
    network = Network([*one, *other])
    for source, target in itertools.product(ours, theirs):
        for port in (9092, 9093, 9094, 9095, 9999):
            # The SuperLink's ports and the enrolment's are open to whoever has a certificate.
            if chart == "site" and target.name.endswith("-supernode"):
                assert not network.reaches(source, target, port), (source.name, target.name)
            if target.name.endswith(("-superexec", "-app", "-first")):
                assert not network.reaches(source, target, port), (source.name, target.name)


def _renamed(manifests: list[Manifest]) -> list[Manifest]:
    return [
        {**one, "metadata": {**one["metadata"], "name": f"{one['metadata']['name']}-b"}}
        if one["kind"] == "Pod"
        else one
        for one in manifests
    ]


@pytest.mark.parametrize("chart", CHARTS)
def test_the_longest_name_of_a_release_makes_names_that_kubernetes_takes(chart: str) -> None:
    # Helm's own limit.
    release = 26 * "a-" + "z"
    assert len(release) == 53
    found = Rendered(SOUND[chart], render(chart, SOUND[chart], release=release))
    assert list(names(found)) == []
    for check in ("references", "selectors", "rights", "addresses"):
        assert list(CHECKS[check](found)) == []
