"""The values of the site chart, the commands that use them, and what the chart makes of both."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from certs.errors import ConfigError
from supernode import helm
from supernode.site import Site
from tests.k8s.charts import Manifest, render


@pytest.fixture
def site(tmp_path: Path) -> Site:
    directory = tmp_path / "a lab"
    return Site(
        directory,
        *("demo", "lab-7", "fed.example:9092", "fed.example:9093"),
        *("/srv/recordings#episodes=0:50", "cuda:1", "helm"),
    )


def written(site: Site) -> Any:
    """Return the values that are written for a site."""
    return yaml.safe_load(helm.write(site).read_text())


def test_values_say_what_the_join_knows(site: Site) -> None:
    path = helm.write(site)
    assert path == site.directory / "values.yaml"
    values = yaml.safe_load(path.read_text())
    assert values["site"] == "lab-7"
    assert values["federation"] == "demo"
    assert (values["superlink"], values["enrolment"]) == ("fed.example:9092", "fed.example:9093")
    # The pod sees its own paths and its own GPU, not this machine's.
    assert values["dataset"] == {
        "existingClaim": "vlafleet-lab-7-data",
        "hub": "",
        "episodes": "0:50",
    }
    assert "/srv" not in path.read_text()
    assert values["app"]["gpu"]["count"] == 1
    assert values["app"]["resources"]["limits"] == {"memory": "24Gi"}
    before = path.read_bytes()
    assert helm.write(site).read_bytes() == before


def test_values_of_a_site_without_gpu_and_with_a_dataset_of_the_hub(site: Site) -> None:
    values = written(replace(site, dataset="hf:owner/name", device="cpu"))
    assert values["dataset"] == {"existingClaim": "", "hub": "owner/name", "episodes": ""}
    assert values["app"]["gpu"]["count"] == 0


@pytest.mark.parametrize("part", ["part=0/2", "episodes=0:5&part=0/2", "episodes=5", "x"])
def test_a_part_that_the_chart_cannot_name_is_refused(site: Site, part: str) -> None:
    with pytest.raises(
        ConfigError, match=r"/data#.+: on Kubernetes a site trains on .*#episodes=A:B"
    ):
        helm.write(replace(site, dataset=f"/data#{part}"))
    assert not (site.directory / "values.yaml").exists()


def test_the_next_steps_make_both_secrets_before_the_chart(site: Site) -> None:
    values = written(site)
    identity, superexec, chart = map(shlex.split, helm.next_steps(site))
    for command, name, directory in (
        (identity, values["identity"]["existingSecret"], site.identity),
        (superexec, values["identity"]["superexecSecret"], site.superexec),
    ):
        assert command[:5] == ["kubectl", "create", "secret", "generic", name]
        files = [word.removeprefix("--from-file=") for word in command if "--from-file" in word]
        assert {Path(file).parent for file in files} == {directory}
        assert {"tls.key", "tls.crt", "ca.crt"} <= {Path(file).name for file in files}
    assert str(site.identity / "node.key") in " ".join(identity)
    assert "node.key" not in " ".join(superexec)
    assert chart[:3] == ["helm", "upgrade", "--install"]
    assert chart[chart.index("--values") + 1] == str(site.directory / "values.yaml")


def test_a_long_name_is_one_that_helm_takes(site: Site) -> None:
    long = replace(site, name="a" * 43 + "-" + "b" * 19)
    release = shlex.split(helm.next_steps(long)[-1])[3]
    assert len(release) <= 53
    assert not release.endswith("-")
    assert written(long)["identity"]["existingSecret"] == f"{release}-identity"


@pytest.mark.parametrize("dataset", ["/srv/recordings#episodes=0:50", "hf:owner/name"])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_chart_takes_the_values_as_they_are(site: Site, dataset: str, device: str) -> None:
    site = replace(site, dataset=dataset, device=device)
    path = helm.write(site)
    release = shlex.split(helm.next_steps(site)[-1])[3]
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in render("site", path, release=release)
        if one["kind"] == "StatefulSet"
    }
    supernode = pods["vlafleet-lab-7-supernode"]
    arguments = " ".join(supernode["containers"][0]["args"])
    assert "--superlink fed.example:9092" in arguments
    assert f"--device {device.partition(':')[0]}" in arguments
    part = dataset.partition("#episodes=")[2]
    assert f"--dataset /data{part and f'#episodes={part}'} " in arguments
    assert secrets(supernode) == {"vlafleet-lab-7-identity"}
    app = pods["vlafleet-lab-7-app"]
    assert secrets(app) == {"vlafleet-lab-7-superexec"}
    limits = app["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (None if device == "cpu" else 1)
    # The chart's own limits that the values do not name stay.
    assert set(limits) >= {"memory", "ephemeral-storage"}


def secrets(pod: Manifest) -> set[str]:
    """Return the Secrets that a pod mounts."""
    return {one["secret"]["secretName"] for one in pod["volumes"] if "secret" in one}
