"""What changes from round to round by what was measured: learning rate, FedProx's mu, when to stop.

Everything here is a function of the run config and of the recorded rounds alone, so that a run
resumed after a crash goes on exactly as it would have. A site's learning rate at a step is
``learning_rate(step) * scale * boost``.

Rounds whose loss was not measured, or not over all sites, count neither as better nor as worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.config import RunConfig

# FedProx's step for mu, and the falls in a row that lower it (arXiv:1812.06127, section 5.3.2).
_MU_STEP = 0.1
_MU_FALLS = 5


@dataclass(frozen=True)
class Past:
    """What a recorded round measured: held-out loss over the sites that compare (``app.record.history``;
    else None) and at each site.

    A history holds one for each round; its index is the round's number, from 0.
    """

    loss: float | None
    sites: Mapping[str, float]


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate at ``step``, counted from 0 over the whole run and not per round.

    A linear rise over the warm-up, times the schedule's decay: with ``cosine`` once over all the
    run's steps, as lerobot does it; with ``warm-restarts`` anew in each cycle of rounds (SGDR,
    Loshchilov and Hutter 2017, arXiv:1608.03983, with cycles of one length). A pure function of
    the step: a schedule that is built anew each round would warm up and decay each round.
    """
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "cosine":
        steps = config.rounds * config.local_steps
        done = min(1.0, step / steps)
    elif config.schedule == "warm-restarts":
        steps = config.cycle_rounds * config.local_steps
        done = step % steps / steps
    else:
        return config.learning_rate * rise
    low, high = config.min_learning_rate, config.learning_rate
    return rise * (low + (high - low) * (1 + math.cos(math.pi * done)) / 2)


def scale(config: RunConfig, history: Sequence[Past]) -> float:
    """What the round after ``history`` multiplies its learning rate by, at every site.

    With ``plateau``, one factor for every ``plateau-rounds`` in a row without a better loss, not
    below ``min-learning-rate``; and a half for each round whose loss spiked.
    """
    factor, spikes = 1.0, 1.0
    lowest, worse = math.inf, 0
    for _, loss in _measured(history):
        if config.spike_factor and loss > config.spike_factor * lowest:
            spikes /= 2
        if loss < lowest:
            lowest, worse = loss, 0
            continue
        worse += 1
        if config.schedule == "plateau" and worse == config.plateau_rounds:
            factor, worse = factor * config.plateau_factor, 0
    return max(factor, min(1.0, config.min_learning_rate / config.learning_rate)) * spikes


def boost(config: RunConfig, history: Sequence[Past], site: str) -> float:
    """What ``site`` alone multiplies its learning rate by: its loss against all sites', at least 1.

    From the last round that measured the loss over all sites; at most ``hard-site-boost``.
    """
    for past in reversed(history):
        if past.loss is not None:
            hardness = past.sites.get(site, past.loss) / past.loss if past.loss else 1.0
            return max(1.0, min(config.hard_site_boost, hardness))
    return 1.0


def mu(config: RunConfig, history: Sequence[Past]) -> float:
    """The weight of FedProx's term in the round after ``history``.

    With ``dynamic-mu`` 0.1 more for each rise of the loss, 0.1 less for each five falls in a row
    and never negative: the heuristic of Li et al. 2020 (arXiv:1812.06127, section 5.3.2).
    """
    value, falls, before = config.proximal_mu, 0, math.nan
    if not config.dynamic_mu:
        return value
    for _, loss in _measured(history):
        falls = falls + 1 if loss < before else 0
        if loss > before:
            value += _MU_STEP
        if falls == _MU_FALLS:
            value, falls = max(0.0, value - _MU_STEP), 0
        # Tenths added and taken away in binary leave 3e-17, which would keep the term switched on.
        value, before = round(value, 9), loss
    return value


def best(history: Sequence[Past]) -> int | None:
    """The round with the lowest loss, the first of equals; None when none was measured."""
    return min(_measured(history), key=lambda entry: entry[1], default=(None,))[0]


def stop(config: RunConfig, history: Sequence[Past]) -> bool:
    """Whether ``patience`` measured rounds have passed without a better loss."""
    found = best(history)
    if not config.patience or found is None:
        return False
    return sum(number > found for number, _ in _measured(history)) >= config.patience


def _measured(history: Sequence[Past]) -> Iterator[tuple[int, float]]:
    """Number and loss of the rounds that can be compared."""
    for number, past in enumerate(history):
        if past.loss is not None:
            yield number, past.loss
