"""The run config: what an ML engineer may set for a run, typed and checked once, at the start.

Flower hands over a flat mapping of kebab-case keys: the defaults of ``[tool.flwr.app.config]`` in
``pyproject.toml``, overridden by ``flwr run --run-config``. A test keeps that table and the
defaults below equal.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certs.errors import ConfigError


def _setting[T: (int, float, str, bool)](
    default: T,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    choices: tuple[str, ...] = (),
    used: Callable[[RunConfig], bool] | None = None,
    when: str = "",
) -> T:
    """A field with its accepted range or words; ``above`` leaves ``low`` itself out.

    ``used`` says whether the field has an effect in a config, and ``when`` says so in words.
    """
    value: T = field(
        default=default,
        metadata={
            "low": low, "high": high, "above": above, "choices": choices, "used": used, "when": when,
        },
    )  # fmt: skip
    return value


# A day is longer than any round should be.
_DAY_S = 86_400
# Steps of a run that would take years.
_STEPS = 1_000_000
_SITES = 10_000
# FedAdam moves every value by about its rate, whatever the size of the updates. Weights are of
# order 0.01 to 0.1; Reddi et al. (2021) tune between 0.001 and 0.1.
_FEDADAM_RATE = 0.1
# A majority of two does not exist.
_ROBUST_QUORUM = 3


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of one run; ``parse`` is the way in."""

    # --- the run -----------------------------------------------------------------------------
    rounds: int = _setting(3, 1, 100_000)
    # Continue the newest run below runs/ from its last round, with the settings it was started with.
    resume: bool = _setting(False)
    # "tiny", a directory, or a name on the Hugging Face Hub.
    model: str = _setting("tiny")
    # The upper end is what torch and numpy both take as a seed.
    seed: int = _setting(0, 0, 2**31 - 1)

    # --- a round: who is asked, and when it ends ---------------------------------------------
    # The run starts when this many sites are online and described themselves.
    min_sites: int = _setting(2, 1, _SITES)
    # Sites trained in a round, drawn by the seed from those online; 0 asks every site.
    sites_per_round: int = _setting(0, 0, _SITES)
    # Asks this many times sites-per-round, and closes the round with the first sites-per-round.
    over_sampling: float = _setting(
        1.0, 1.0, 10.0, used=lambda c: c.sites_per_round > 0, when="with sites-per-round"
    )
    # Valid updates without which a round fails and the model stays as it was.
    quorum: int = _setting(1, 1, _SITES)
    # Seconds after which a round closes as soon as it has its quorum; 0 waits for every site.
    soft_deadline: float = _setting(0.0, 0.0, _DAY_S)
    # Seconds: the hard deadline of every wait for sites.
    round_timeout: float = _setting(600.0, 0.0, _DAY_S, above=True)
    # Seconds a site that went offline may take to come back. Flower calls a silent node offline
    # after about 54 s, and a link that returns still delivers its reply; a minute more covers
    # links lost for almost two.
    grace: float = _setting(60.0, 0.0, _DAY_S)

    # --- training at a site ------------------------------------------------------------------
    # Optimiser steps at each site in each round.
    local_steps: int = _setting(30, 1, _STEPS)
    batch_size: int = _setting(8, 1, 4096)
    # The share of each site's episodes that is never trained on. Above a half, a site would test
    # more than it teaches.
    held_out: float = _setting(0.2, 0.0, 0.5, above=True)
    # Weight of FedProx's pull towards the round's model.
    proximal_mu: float = _setting(0.0, 0.0, 1000.0)
    # Forget AdamW's moments between rounds; kept, they lie on the site's own disk.
    reset_optimizer: bool = _setting(False)
    # What is trained and crosses the wire: the whole action expert, or low-rank adapters of it.
    exchange: str = _setting("expert", choices=("expert", "lora"))
    # lerobot's default is 16; the expert is 720 wide, a rank beyond a third of it saves nothing.
    lora_rank: int = _setting(
        16, 1, 256, used=lambda c: c.exchange == "lora", when="with exchange=lora"
    )
    # CPU threads torch may use at each site.
    threads: int = _setting(1, 1, 1024)
    # Frames that are in the device's memory at a time; 0 takes the batch at once.
    micro_batch: int = _setting(0, 0, 4096)
    # Where a site keeps what the frozen VLM makes of its frames (app/prefix_cache.py).
    prefix_cache: str = _setting(
        "auto", choices=("auto", "gpu", "memory", "disk", "embeddings", "none")
    )
    # lerobot's image transforms on training frames; the frozen VLM then runs in every step.
    image_augmentation: bool = _setting(False)
    # torch.compile the step: minutes at the start, repaid by long runs on a GPU.
    compile: bool = _setting(False)

    # --- learning rate, over the whole run and not per round (app/schedule.py) ----------------
    learning_rate: float = _setting(1e-3, 0.0, 1.0, above=True)
    # Steps over which the learning rate rises.
    warmup_steps: int = _setting(10, 0, _STEPS)
    schedule: str = _setting("cosine", choices=("constant", "cosine", "warm-restarts", "plateau"))
    # Where cosine and warm-restarts end, and what plateau does not go below.
    min_learning_rate: float = _setting(
        0.0, 0.0, 1.0, used=lambda c: c.schedule != "constant", when="with a schedule that decays"
    )
    # Rounds of one warm-restarts cycle.
    cycle_rounds: int = _setting(
        10, 1, 100_000, used=lambda c: c.schedule == "warm-restarts", when="with warm-restarts"
    )
    # Rounds without a better held-out loss after which plateau multiplies by plateau-factor.
    plateau_rounds: int = _setting(
        3, 1, 100_000, used=lambda c: c.schedule == "plateau", when="with schedule=plateau"
    )
    plateau_factor: float = _setting(
        0.5, 0.0, 1.0, above=True, used=lambda c: c.schedule == "plateau", when="with plateau"
    )
    # The most a site's learning rate is raised while its held-out loss is above the mean; 1 is off.
    hard_site_boost: float = _setting(1.0, 1.0, 10.0)
    # Halve the learning rate after each round whose held-out loss is above this many times the
    # best one so far; 0 is off.
    spike_factor: float = _setting(0.0, 0.0, 1000.0)
    # Raise proximal-mu by 0.1 when the held-out loss rises, lower it after five falls in a row.
    dynamic_mu: bool = _setting(False)
    # Rounds without a better held-out loss after which the run ends; 0 is off.
    patience: int = _setting(0, 0, 100_000)

    # --- combining updates -------------------------------------------------------------------
    # How updates and the broadcast are encoded (app/codec.py).
    codec: str = _setting("int8", choices=("fp32", "bf16", "int8", "int4"))
    strategy: str = _setting("fedavg", choices=("fedavg", "fedavgm", "fedadam"))
    server_learning_rate: float = _setting(1.0, 0.0, 10.0, above=True)
    # FedAvgM's momentum and FedAdam's beta 1.
    server_momentum: float = _setting(
        0.9, 0.0, 0.9999, used=lambda c: c.strategy != "fedavg", when="with fedavgm and fedadam"
    )
    # FedAdam's beta 2 and tau, the values of Reddi et al. 2021 (arXiv:2003.00295).
    server_beta2: float = _setting(
        0.99, 0.0, 0.9999, used=lambda c: c.strategy == "fedadam", when="with strategy=fedadam"
    )
    server_tau: float = _setting(
        1e-3, 0.0, 1.0, above=True, used=lambda c: c.strategy == "fedadam", when="with fedadam"
    )
    # For sites that are not trusted: each value's trimmed mean or median, without weights.
    robust: str = _setting("none", choices=("none", "trimmed-mean", "median"))
    # The share of values that trimmed-mean drops at either end.
    trim: float = _setting(
        0.2,
        0.0,
        0.5,
        above=True,
        used=lambda c: c.robust == "trimmed-mean",
        when="with trimmed-mean",
    )
    # Updates with a larger L2 norm are refused; 0 sets no bound.
    norm_bound: float = _setting(0.0, 0.0, 1e12)

    # --- evaluation --------------------------------------------------------------------------
    # Batches of held-out frames each evaluation looks at.
    eval_batches: int = _setting(8, 1, 100_000)
    # Dataset URIs on the SuperLink's side that no site trains on, separated by blanks.
    eval_datasets: str = _setting("")

    # --- publishing --------------------------------------------------------------------------
    # "owner/name" on the Hugging Face Hub; nothing is pushed without it.
    push_to: str = _setting("")
    # Push after each so many rounds as well as at the end; 0 pushes at the end alone.
    push_every: int = _setting(0, 0, 100_000, used=lambda c: bool(c.push_to), when="with push-to")
    push_private: bool = _setting(True, used=lambda c: bool(c.push_to), when="with push-to")

    # --- simulation --------------------------------------------------------------------------
    # The dataset whose episodes Flower's simulation runtime shares out among its nodes.
    simulation_dataset: str = _setting("")

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
        config = cls(**values)  # type: ignore[arg-type]
        for key, setting in settings.items():
            used, value = setting.metadata["used"], getattr(config, setting.name)
            if used and value != setting.default and not used(config):
                raise ConfigError(
                    f"The run config sets {key}={value!r}, which has an effect only "
                    f"{setting.metadata['when']}: leave it out."
                )
        if 0 < config.round_timeout < config.soft_deadline:
            raise ConfigError(
                f"The run config sets soft-deadline={config.soft_deadline:g} above "
                f"round-timeout={config.round_timeout:g}: the soft deadline comes first."
            )
        if 0 < config.sites_per_round < config.quorum:
            raise ConfigError(
                f"The run config sets quorum={config.quorum} above "
                f"sites-per-round={config.sites_per_round}: no round could have its quorum."
            )
        if config.strategy == "fedadam" and config.server_learning_rate > _FEDADAM_RATE:
            raise ConfigError(
                f"The run config sets server-learning-rate={config.server_learning_rate:g} with "
                f"strategy='fedadam', whose steps are of that size in every value: set "
                f"server-learning-rate, at most {_FEDADAM_RATE:g}."
            )
        if config.robust != "none" and config.quorum < _ROBUST_QUORUM:
            raise ConfigError(
                f"The run config sets robust={config.robust!r} with quorum={config.quorum}: with "
                f"fewer than {_ROBUST_QUORUM} updates none can be told from the others, set "
                f"quorum={_ROBUST_QUORUM} or more."
            )
        if config.min_learning_rate > config.learning_rate:
            raise ConfigError(
                f"The run config sets min-learning-rate={config.min_learning_rate:g} above "
                f"learning-rate={config.learning_rate:g}: the rate decays."
            )
        if 0 < config.spike_factor < 1:
            raise ConfigError(
                f"The run config sets spike-factor={config.spike_factor:g}: it takes 0 (off), or a "
                "number from 1 on."
            )
        return config

    def as_dict(self) -> dict[str, bool | int | float | str]:
        """The settings under their run-config keys."""
        return {
            _key(setting.name): getattr(self, setting.name) for setting in dataclasses.fields(self)
        }


def home() -> Path:
    """Where models and a site's own state are kept: ``VLAFLEET_HOME``, else ``~/.cache/vlafleet``."""
    return Path(os.environ.get("VLAFLEET_HOME") or "~/.cache/vlafleet").expanduser().absolute()


def models_directory() -> Path:
    """Where models are kept: ``models`` below :func:`home`."""
    return home() / "models"


def _key(name: str) -> str:
    return name.replace("_", "-")


def _checked(key: str, setting: dataclasses.Field[Any], value: object) -> bool | int | float | str:
    # Under `from __future__ import annotations` a field's type is its source text.
    kind = str(setting.type)
    if kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, str) and _fits(setting, value):
            return value
    # bool is an int to Python, but `rounds=true` is a mistake.
    elif isinstance(value, (int, float) if kind == "float" else int) and not isinstance(
        value, bool
    ):
        number = float(value) if kind == "float" else int(value)
        low, high = setting.metadata["low"], setting.metadata["high"]
        if low <= number <= high and not (setting.metadata["above"] and number == low):
            return number
    raise ConfigError(f"The run config sets {key}={value!r}: it takes {_accepted(setting)}.")


def _fits(setting: dataclasses.Field[Any], value: str) -> bool:
    if choices := setting.metadata["choices"]:
        return value in choices
    # A setting that is empty by default may be; a model without a name is a mistake.
    return bool(value.strip()) or setting.default == ""


def _accepted(setting: dataclasses.Field[Any]) -> str:
    kind = str(setting.type)
    if kind == "bool":
        return "true or false"
    if choices := setting.metadata["choices"]:
        return "one of " + ", ".join(f"'{choice}'" for choice in choices)
    if kind == "str":
        return "a text in quotes that is not empty"
    low, high = setting.metadata["low"], setting.metadata["high"]
    start = f"above {low} up to" if setting.metadata["above"] else f"from {low} to"
    return f"{'a number' if kind == 'float' else 'a whole number'} {start} {high}"
