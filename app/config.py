"""The run config: what an ML engineer may set for a run, typed and checked once, at the start.

Flower hands over a flat mapping of kebab-case keys: the defaults of ``[tool.flwr.app.config]`` in
``pyproject.toml``, overridden by ``flwr run --run-config``. A test keeps that table and the
defaults below equal.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from certs.errors import ConfigError


def _setting[T: (int, float, str)](
    default: T, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> T:
    """A field with its accepted range; ``above`` leaves ``low`` itself out."""
    value: T = field(default=default, metadata={"low": low, "high": high, "above": above})
    return value


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of one run; ``parse`` is the way in."""

    rounds: int = _setting(3, 1, 100_000)
    # Optimiser steps at each site in each round.
    local_steps: int = _setting(30, 1, 1_000_000)
    batch_size: int = _setting(8, 1, 4096)
    # Batches of held-out frames each evaluation looks at.
    eval_batches: int = _setting(8, 1, 100_000)
    # "tiny", a directory, or a name on the Hugging Face Hub.
    model: str = _setting("tiny")
    learning_rate: float = _setting(1e-3, 0.0, 1.0, above=True)
    # Steps over which the learning rate rises, counted over the whole run and not per round.
    warmup_steps: int = _setting(10, 0, 1_000_000)
    # The upper end is what torch and numpy both take as a seed.
    seed: int = _setting(0, 0, 2**31 - 1)
    # The share of each site's episodes that is never trained on. Above a half, a site would test
    # more than it teaches.
    held_out: float = _setting(0.2, 0.0, 0.5, above=True)
    # The run starts when this many sites are online and described themselves.
    min_sites: int = _setting(2, 1, 10_000)
    # Seconds: the hard deadline of every wait for sites. A day is longer than any round should be.
    round_timeout: float = _setting(600, 0.0, 86_400, above=True)
    # CPU threads torch may use in each ClientApp.
    threads: int = _setting(1, 1, 1024)

    @classmethod
    def parse(cls, run_config: Mapping[str, object]) -> RunConfig:
        """The typed config of ``run_config``; ``ConfigError`` names the key and what it accepts."""
        settings = {_key(setting.name): setting for setting in dataclasses.fields(cls)}
        for key in run_config:
            if key not in settings:
                known = ", ".join(sorted(settings))
                raise ConfigError(
                    f"The run config has the unknown key '{key}': the keys are {known}."
                )
        values = {
            settings[key].name: _checked(key, settings[key], value)
            for key, value in run_config.items()
        }
        return cls(**values)  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, int | float | str]:
        """The settings under their run-config keys."""
        return {
            _key(setting.name): getattr(self, setting.name) for setting in dataclasses.fields(self)
        }


def models_directory() -> Path:
    """Where models are kept: ``models`` below ``VLAFLEET_HOME``, else below ``~/.cache/vlafleet``."""
    home = os.environ.get("VLAFLEET_HOME") or "~/.cache/vlafleet"
    return Path(home).expanduser().absolute() / "models"


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate at ``step``, counted from 0 over the whole run and not per round.

    A linear rise over the warm-up, then constant. A pure function of the step: a schedule that is
    built anew each round would warm up and decay each round.
    """
    return config.learning_rate * min(1.0, (step + 1) / (config.warmup_steps + 1))


def _key(name: str) -> str:
    return name.replace("_", "-")


def _checked(
    key: str, setting: dataclasses.Field[int | float | str], value: object
) -> int | float | str:
    # Under `from __future__ import annotations` a field's type is its source text.
    kind = str(setting.type)
    accepted = _accepted(setting)
    # bool is an int to Python, but `rounds=true` is a mistake.
    if kind == "str":
        if isinstance(value, str) and value.strip():
            return value
    elif isinstance(value, (int, float) if kind == "float" else int) and not isinstance(
        value, bool
    ):
        number = float(value) if kind == "float" else int(value)
        low, high = setting.metadata["low"], setting.metadata["high"]
        if low <= number <= high and not (setting.metadata["above"] and number == low):
            return number
    raise ConfigError(f"The run config sets {key}={value!r}: it takes {accepted}.")


def _accepted(setting: dataclasses.Field[int | float | str]) -> str:
    kind = str(setting.type)
    if kind == "str":
        return "a text in quotes that is not empty"
    low, high = setting.metadata["low"], setting.metadata["high"]
    start = f"above {low} up to" if setting.metadata["above"] else f"from {low} to"
    return f"{'a number' if kind == 'float' else 'a whole number'} {start} {high}"
