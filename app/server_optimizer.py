"""What the SuperLink's side makes of a round's mean update: FedAvg, FedAvgM or FedAdam.

The mean update is taken for a negative gradient, and the server takes a step of its own along it
(FedAvgM: Hsu et al. 2019, arXiv:1909.06335; FedAdam: Reddi et al. 2021, arXiv:2003.00295,
Algorithm 2, without bias correction as there).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from app.config import RunConfig

# What each strategy remembers of every tensor between rounds: fp32, of the tensor's shape, and zero
# before the first round. For FedAdam's second moment the paper starts at tau squared or above;
# from zero, tau alone bounds the first steps.
STATE: Mapping[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedavgm": ("momentum",),
    "fedadam": ("momentum", "second"),
}


def step(
    config: RunConfig, mean: npt.NDArray[np.float32], state: dict[str, npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """The change to add to one tensor of the model; replaces the arrays in that tensor's ``state``."""
    rate = np.float32(config.server_learning_rate)
    beta1, beta2 = np.float32(config.server_momentum), np.float32(config.server_beta2)
    one, tau = np.float32(1), np.float32(config.server_tau)
    change = mean
    if config.strategy == "fedavgm":
        change = state["momentum"] = np.asarray(beta1 * state["momentum"] + mean)
    elif config.strategy == "fedadam":
        state["momentum"] = np.asarray(beta1 * state["momentum"] + (one - beta1) * mean)
        state["second"] = np.asarray(beta2 * state["second"] + (one - beta2) * np.square(mean))
        change = state["momentum"] / (np.sqrt(state["second"]) + tau)
    return np.asarray(rate * change)
