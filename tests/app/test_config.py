"""The run config is typed, complete, and refuses what it does not know."""

import dataclasses
import math
import re
import tomllib
from pathlib import Path

import pytest

from app.config import RunConfig, models_directory
from certs.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def table() -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    return loaded


def test_the_defaults_are_the_table_flower_reads() -> None:
    assert RunConfig().as_dict() == table()
    assert RunConfig.parse(table()) == RunConfig()


def test_overrides_keep_the_other_defaults() -> None:
    config = RunConfig.parse({"rounds": 7, "learning-rate": 1, "model": "hf:lerobot/smolvla_base"})
    assert (config.rounds, config.learning_rate, config.model) == (
        7,
        1.0,
        "hf:lerobot/smolvla_base",
    )
    assert isinstance(config.learning_rate, float)
    assert config.batch_size == RunConfig().batch_size


def test_it_survives_a_round_trip() -> None:
    config = RunConfig(rounds=2, held_out=0.25, seed=9)
    assert RunConfig.parse(config.as_dict()) == config


def test_an_unknown_key_is_named_with_the_accepted_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'local_steps'.*local-steps") as caught:
        RunConfig.parse({"local_steps": 3})
    for setting in dataclasses.fields(RunConfig):
        assert setting.name.replace("_", "-") in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("rounds", 0, "a whole number from 1 to 100000"),
        ("rounds", 2.0, "a whole number"),
        ("rounds", True, "a whole number"),
        ("rounds", "3", "a whole number"),
        ("learning-rate", 0, "a number above 0.0 up to 1.0"),
        ("learning-rate", "fast", "a number"),
        ("learning-rate", math.nan, "a number"),
        ("held-out", 0.9, "up to 0.5"),
        ("round-timeout", math.inf, "86400"),
        ("seed", 2**31, "a whole number from 0"),
        ("model", "", "a text in quotes"),
        ("model", 3, "a text in quotes"),
        ("codec", "int2", "one of 'fp32', 'bf16', 'int8', 'int4'"),
        ("strategy", 3, "one of 'fedavg'"),
        ("resume", 1, "true or false"),
        ("resume", "true", "true or false"),
    ],
)
def test_a_bad_value_is_named_with_its_key_and_range(
    key: str, value: object, accepted: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({key: value})
    assert f"{key}={value!r}" in str(caught.value)
    assert accepted in str(caught.value)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"over-sampling": 1.5}, "only with sites-per-round"),
        ({"min-learning-rate": 1e-4, "schedule": "constant"}, "only with a schedule that decays"),
        ({"cycle-rounds": 3}, "only with warm-restarts"),
        ({"plateau-factor": 0.1}, "only with plateau"),
        ({"plateau-rounds": 9}, "only with schedule=plateau"),
        ({"server-momentum": 0.5}, "only with fedavgm and fedadam"),
        ({"server-beta2": 0.5, "strategy": "fedavgm"}, "only with strategy=fedadam"),
        ({"server-tau": 0.5}, "only with fedadam"),
        ({"trim": 0.1, "robust": "median", "quorum": 3}, "only with trimmed-mean"),
        ({"push-every": 3}, "only with push-to"),
        ({"push-private": False}, "only with push-to"),
    ],
)
def test_a_setting_without_an_effect_is_refused(given: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(given))}=.*which has an effect {named}"):
        RunConfig.parse(given)


def test_the_same_settings_are_accepted_where_they_have_one() -> None:
    for given in (
        {"over-sampling": 1.5, "sites-per-round": 2},
        {"min-learning-rate": 1e-4, "cycle-rounds": 3, "schedule": "warm-restarts"},
        {"plateau-factor": 0.1, "plateau-rounds": 9, "schedule": "plateau"},
        {
            "server-momentum": 0.5,
            "server-beta2": 0.5,
            "server-tau": 0.5,
            "strategy": "fedadam",
            "server-learning-rate": 0.01,
        },
        {"trim": 0.1, "robust": "trimmed-mean", "quorum": 3},
        {"push-to": "lab/model", "push-every": 3, "push-private": False},
    ):
        parsed = RunConfig.parse(given).as_dict()
        assert {key: parsed[key] for key in given} == given


def test_the_soft_deadline_comes_before_the_hard_one() -> None:
    with pytest.raises(ConfigError, match="soft-deadline=70 above round-timeout=60"):
        RunConfig.parse({"soft-deadline": 70, "round-timeout": 60})


def test_a_strategy_that_would_spoil_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="server-learning-rate=1 with strategy='fedadam'"):
        RunConfig.parse({"strategy": "fedadam"})
    for robust in ("median", "trimmed-mean"):
        with pytest.raises(ConfigError, match=f"robust='{robust}' with quorum=2: .*set quorum=3"):
            RunConfig.parse({"robust": robust, "quorum": 2})


def test_the_quorum_is_not_above_the_sites_of_a_round() -> None:
    with pytest.raises(ConfigError, match="quorum=3 above sites-per-round=2"):
        RunConfig.parse({"quorum": 3, "sites-per-round": 2})


def test_the_learning_rate_does_not_decay_upwards_nor_halve_without_a_spike() -> None:
    with pytest.raises(ConfigError, match=r"min-learning-rate=0\.1 above learning-rate=0\.01"):
        RunConfig.parse({"min-learning-rate": 0.1, "learning-rate": 0.01})
    with pytest.raises(ConfigError, match=r"spike-factor=0\.5"):
        RunConfig.parse({"spike-factor": 0.5})


def test_models_are_kept_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLAFLEET_HOME", str(tmp_path))
    assert models_directory() == tmp_path / "models"
    monkeypatch.delenv("VLAFLEET_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_directory() == tmp_path / ".cache" / "vlafleet" / "models"


def test_the_page_lists_every_key_with_its_default() -> None:
    page = (PYPROJECT.parent / "docs" / "run-config.md").read_text()
    listed = dict(re.findall(r"^\| `([a-z0-9-]+)` \| `([^`]*)` \| .+ \|$", page, re.MULTILINE))
    expected = {key: tomllib.loads(f"x = {value}")["x"] for key, value in listed.items()}
    assert expected == RunConfig().as_dict()
