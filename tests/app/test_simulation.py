"""Which dataset a simulated site has, and what it leaves on disk."""

from pathlib import Path

import pytest

from app.simulation import forget, site_of
from certs.errors import ConfigError


def node(number: int, sites: int) -> dict[str, object]:
    return {"partition-id": number, "num-partitions": sites}


def test_a_supernode_names_its_site_itself() -> None:
    config = {"simulation-dataset": "/data/all"}
    assert site_of({"site": "site-a", "dataset": "/data/a"}, config) is None


def test_the_sites_share_one_dataset() -> None:
    found = [
        site_of(node(number, 3), {"simulation-dataset": "hf:acme/pick"}) for number in range(3)
    ]
    assert found == [
        ("site-0000", "hf:acme/pick#part=0/3"),
        ("site-0001", "hf:acme/pick#part=1/3"),
        ("site-0002", "hf:acme/pick#part=2/3"),
    ]


def test_a_range_of_a_dataset_is_shared() -> None:
    config = {"simulation-dataset": "/data/all#episodes=10:90"}
    assert site_of(node(7, 20), config) == ("site-0007", "/data/all#episodes=10:90&part=7/20")


def test_several_datasets_take_turns() -> None:
    config = {"simulation-dataset": " /a  /b "}
    found = [site_of(node(number, 5), config) for number in range(5)]
    assert [site and site[1] for site in found] == [
        "/a#part=0/3", "/b#part=0/2", "/a#part=1/3", "/b#part=1/2", "/a#part=2/3",
    ]  # fmt: skip


@pytest.mark.parametrize("datasets", ["", " ", "/a /b /c"])
def test_too_few_or_too_many_datasets_are_refused(datasets: str) -> None:
    with pytest.raises(ConfigError, match=r"names [03] datasets for 2 simulated sites"):
        site_of(node(0, 2), {"simulation-dataset": datasets})


def test_a_complete_run_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path))
    kept = [tmp_path / "sites" / name for name in ("site-0001/12", "site-0002/12", "site-0001/7")]
    for folder in kept:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    forget("12")
    assert [folder.exists() for folder in kept] == [False, False, True]
    forget("99")
