"""What ``vlafleet simulate`` asks of Flower's simulation runtime."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from certs.errors import ConfigError
from superlink.simulation import gpu_share, simulation_request
from tests.conftest import Vlafleet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app alone: Flower looks at every file beside a pyproject.toml, of a virtual environment too."""
    folder = tmp_path_factory.mktemp("app")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def request(app: Path, **changes: Any) -> Any:
    options = {"datasets": ["hf:a/b"], "sites": 8, "parallel": 2, "gpus": 0, "run_config": []}
    return simulation_request(app, **{**options, **changes})


def test_as_many_clientapps_at_a_time_as_asked_for(app: Path) -> None:
    federation = request(app, sites=50, parallel=3).override_federation_config
    assert federation.num_supernodes == 50
    assert int(federation.init_args_num_cpus / federation.client_resources_num_cpus) == 3


def test_the_clientapps_share_the_gpus() -> None:
    """Flower fits int(GPUs / share) ClientApps; ray counts in ten-thousandths and takes no fraction above one."""
    for gpus in (1, 2, 8):
        for parallel in range(1, 65):
            share = gpu_share(gpus, parallel)
            assert int(gpus / share) >= parallel
            assert share <= 1 or share == int(share)
            assert share * 10_000 == pytest.approx(round(share * 10_000))


def test_without_a_gpu_none_is_asked_for(app: Path) -> None:
    federation = request(app, gpus=0).override_federation_config
    assert (federation.init_args_num_gpus, federation.client_resources_num_gpus) == (0, 0)


def test_the_run_waits_for_every_site_unless_told_otherwise(app: Path) -> None:
    def setting(key: str, **changes: Any) -> Any:
        return request(app, **changes).override_config[key]

    assert setting("min-sites").sint64 == 8
    assert setting("min-sites", run_config=["min-sites=5 rounds=1"]).sint64 == 5
    assert setting("rounds", run_config=["min-sites=5 rounds=1"]).sint64 == 1


def test_datasets_mean_the_same_everywhere(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = request(app, datasets=["data/pick#episodes=0:9", "hf:acme/place", "/abs"])
    assert found.override_config["simulation-dataset"].string == (
        f"{tmp_path}/data/pick#episodes=0:9 hf:acme/place /abs"
    )
    with pytest.raises(ConfigError, match="holds a blank"):
        request(app, datasets=["my data"])


def test_a_wrong_run_config_is_refused_before_anything_starts(
    app: Path, vlafleet: Vlafleet
) -> None:
    done = vlafleet("simulate", "--dataset", "hf:a/b", "-c", "nope=1", cwd=app)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.startswith("vlafleet: the run config has the unknown key 'nope'")
    assert done.stdout == ""
