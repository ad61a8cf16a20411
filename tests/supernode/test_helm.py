"""The values of the site chart, and the commands that use them."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from supernode import helm
from supernode.site import Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    directory = tmp_path / "a lab"
    return Site(
        directory,
        *("demo", "lab-7", "fed.example:9092", "fed.example:9093"),
        *("/srv/recordings#episodes=0:50", "cuda:1", "helm"),
    )


def test_values_say_what_the_join_knows(site: Site) -> None:
    path = helm.write(site)
    assert path == site.directory / "values.yaml"
    values = yaml.safe_load(path.read_text())
    assert values["site"] == "lab-7"
    assert values["federation"] == "demo"
    assert (values["superlink"], values["enrolment"]) == ("fed.example:9092", "fed.example:9093")
    # The pod sees its own paths and its own GPU, not this machine's.
    assert values["dataset"]["uri"] == "/data#episodes=0:50"
    assert "/srv" not in path.read_text()
    assert (values["device"], values["gpus"]) == ("cuda", 1)
    assert values["resources"]["app"]["limits"] == {"memory": "24Gi"}
    written = path.read_bytes()
    assert helm.write(site).read_bytes() == written


def test_values_of_a_site_without_gpu_and_with_a_dataset_of_the_hub(site: Site) -> None:
    path = helm.write(replace(site, dataset="hf:owner/name#episodes=0:5", device="cpu"))
    values = yaml.safe_load(path.read_text())
    assert values["dataset"] == {"uri": "hf:owner/name#episodes=0:5", "existingClaim": ""}
    assert (values["device"], values["gpus"]) == ("cpu", 0)


def test_the_next_steps_make_both_secrets_before_the_chart(site: Site) -> None:
    helm.write(site)
    values = yaml.safe_load((site.directory / "values.yaml").read_text())
    identity, superexec, chart = map(shlex.split, helm.next_steps(site))
    for command, name, directory in (
        (identity, values["secrets"]["identity"], site.identity),
        (superexec, values["secrets"]["superexec"], site.superexec),
    ):
        assert command[:5] == ["kubectl", "create", "secret", "generic", name]
        files = [word.removeprefix("--from-file=") for word in command if "--from-file" in word]
        assert {Path(file).parent for file in files} == {directory}
        assert {"tls.key", "tls.crt", "ca.crt"} <= {Path(file).name for file in files}
    assert str(site.identity / "node.key") in " ".join(identity)
    assert "node.key" not in " ".join(superexec)
    assert chart[:3] == ["helm", "upgrade", "--install"]
    assert chart[chart.index("--values") + 1] == str(site.directory / "values.yaml")
