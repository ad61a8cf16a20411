"""Local training at a site: lerobot's sampler, processors, loss and optimiser settings, for a given number of steps."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.dataset import SiteDataset, readable
from app.policy import CAMERAS, Processors, trainable_tensors
from certs.errors import ConfigError, DatasetError, RunFailedError

if TYPE_CHECKING:
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

# AdamW's two moments, in torch's words.
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerState:
    """AdamW between two rounds: its steps so far, and ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of each tensor.

    A tensor that no gradient reaches has no moments.
    """

    step: int
    tensors: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TrainResult:
    """What a site reports, and the optimiser's state for the next round.

    Frames drawn; mean and last loss without the proximal term; that term's mean over the steps, None without one; mean
    gradient norm before clipping; wall-clock seconds.
    """

    frames: int
    mean_loss: float
    last_loss: float
    proximal_loss: float | None
    grad_norm: float
    seconds: float
    optimizer_state: OptimizerState


def train(
    policy: "SmolVLAPolicy",
    processors: Processors,
    dataset: SiteDataset,
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    seed: int,
    global_step: int,
    progress: Callable[[int, float], None],
    proximal_mu: float = 0.0,
    optimizer_state: OptimizerState | None = None,
    deadline: float | None = None,
) -> TrainResult:
    """Take ``steps`` optimiser steps on the training episodes; the policy's trainable tensors change in place.

    ``learning_rate`` is asked with the run's step, from ``global_step`` on, so a round does not warm up again. The
    order of frames and the flow-matching noise of a step are functions of ``seed`` and the run's step alone: with
    ``optimizer_state`` carried over, two rounds end in the same bits as one of twice the length. ``progress`` is told
    step (from 1) and loss.

    ``proximal_mu`` weighs FedProx's pull towards the weights at the start (Li et al. 2020, arXiv:1812.06127).

    Raises DatasetError for unreadable or non-finite data, ConfigError when the loss diverges, both before the step that
    would have poisoned the weights; RunFailedError when ``deadline`` (``time.monotonic``) passes before the last step.
    """
    import torch

    started = time.perf_counter()
    preset = policy.config.get_optimizer_preset()
    trainable = trainable_tensors(policy)
    parameters = list(trainable.values())
    optimizer = preset.build(parameters)
    if optimizer_state:
        _restore(optimizer, trainable, optimizer_state)
    anchors = [p.detach().clone() for p in parameters] if proximal_mu else []
    device = torch.device(policy.config.device)
    opened = dataset.lerobot(dataset.train_episodes, policy.config.chunk_size)
    batches = _batches(opened, dataset, batch_size=batch_size, seed=seed, global_step=global_step)
    frames, loss_sum, norm_sum, proximal_sum, last_loss = 0, 0.0, 0.0, 0.0, math.nan
    policy.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(steps):
            _require_time(deadline, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(global_step + step)
            batch = next(batches)
            size = len(batch["index"])
            # After the batch: a DataLoader draws from the same generator where an epoch begins.
            torch.manual_seed(_noise_seed(seed, global_step + step))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = policy.forward(processors[0](batch))
            last_loss = loss.item()
            _require_finite(last_loss, "loss", global_step + step, learning_rate)
            loss.backward()
            if proximal_mu:
                proximal_sum += _pull(parameters, anchors, proximal_mu)
            norm = torch.nn.utils.clip_grad_norm_(parameters, preset.grad_clip_norm).item()
            _require_finite(norm, "gradient", global_step + step, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            frames += size
            loss_sum += last_loss * size
            norm_sum += norm
            progress(step + 1, last_loss)
    return TrainResult(
        frames=frames,
        mean_loss=loss_sum / frames,
        last_loss=last_loss,
        proximal_loss=proximal_sum / steps if proximal_mu else None,
        grad_norm=norm_sum / steps,
        seconds=time.perf_counter() - started,
        optimizer_state=_moments(optimizer, trainable),
    )


def _restore(
    optimizer: "torch.optim.Optimizer",
    trainable: "Mapping[str, torch.Tensor]",
    state: OptimizerState,
) -> None:
    """Put the moments where AdamW would have put them; copies, for it changes them in place."""
    import torch

    for name, parameter in trainable.items():
        if f"{_MOMENTS[0]}.{name}" in state.tensors:
            moments = {kind: state.tensors[f"{kind}.{name}"] for kind in _MOMENTS}
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                **{k: torch.tensor(v, device=parameter.device) for k, v in moments.items()},
            }


def _moments(
    optimizer: "torch.optim.Optimizer", trainable: "Mapping[str, torch.Tensor]"
) -> OptimizerState:
    step, tensors = 0, {}
    for name, parameter in trainable.items():
        if state := optimizer.state.get(parameter):
            step = int(state["step"])
            for kind in _MOMENTS:
                tensors[f"{kind}.{name}"] = state[kind].cpu().numpy()
    return OptimizerState(step, tensors)


def _pull(parameters: "list[torch.Tensor]", anchors: "list[torch.Tensor]", mu: float) -> float:
    """Add the gradient of mu/2 * ||w - w0||^2, the value returned; one tensor's worth of memory, no graph."""
    import torch

    # One sum, not a list of them: small tensors kept between large ones fragment the heap (+400 MB for SmolVLA).
    squares = torch.zeros((), device=parameters[0].device)
    with torch.no_grad():
        for parameter, anchor in zip(parameters, anchors, strict=True):
            # A tensor that no gradient reaches does not move either.
            if parameter.grad is not None:
                change = parameter - anchor
                parameter.grad.add_(change, alpha=mu)
                squares += change.square_().sum()
    return mu / 2 * squares.item()


def _require_time(deadline: float | None, step: int, steps: int) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise RunFailedError(
            f"The round's deadline passed after {step} of {steps} training steps at this site: "
            "raise round-timeout or lower local-steps."
        )


def to_batch(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack lerobot's items and scale the policy's cameras from uint8 to [0, 1], as lerobot-train does."""
    from torch.utils.data import default_collate

    batch: dict[str, Any] = default_collate(items)
    for camera in CAMERAS:
        if camera in batch:
            batch[camera] = batch[camera].float() / 255
    return batch


def require_finite_rows(batch: dict[str, Any], dataset: SiteDataset) -> None:
    """Refuse a batch with a state or action that is not finite: one such step makes every weight NaN."""
    for key in ("observation.state", "action"):
        broken = ~batch[key].isfinite().flatten(1).all(dim=1)
        if broken.any():
            episode = int(batch["episode_index"][broken][0])
            raise DatasetError(
                f"episode {episode} of {dataset.root} holds values of {key} that are not finite: "
                "delete or record the episode again."
            )


def _batches(
    opened: "LeRobotDataset", dataset: SiteDataset, *, batch_size: int, seed: int, global_step: int
) -> Iterator[dict[str, Any]]:
    """Endless batches in the order of lerobot's sampler, entered where step ``global_step`` of the run would be."""
    from lerobot.datasets.sampler import EpisodeAwareSampler, compute_sampler_state
    from torch.utils.data import DataLoader

    episodes = opened.meta.episodes
    sampler = EpisodeAwareSampler(
        episodes["dataset_from_index"],
        episodes["dataset_to_index"],
        episode_indices_to_use=list(dataset.train_episodes),
        shuffle=True,
        seed=seed,
        absolute_to_relative_idx=opened.absolute_to_relative_idx,
    )
    sampler.load_state_dict(
        compute_sampler_state(global_step, len(sampler), batch_size, num_processes=1)
    )
    # No worker processes: spawning one costs 16 s to its first batch, more than a round of the tiny model.
    loader = DataLoader(
        opened, batch_size=batch_size, sampler=sampler, collate_fn=to_batch, num_workers=0
    )
    while True:
        iterator = iter(loader)
        while True:
            with readable(dataset):
                batch = next(iterator, None)
            if batch is None:
                break
            require_finite_rows(batch, dataset)
            yield batch


def _noise_seed(seed: int, step: int) -> int:
    # 63 bits, so that it is a valid seed for every torch generator.
    return int.from_bytes(sha256(f"train/{seed}/{step}".encode()).digest()[:8], "little") >> 1


def _require_finite(
    value: float, what: str, step: int, learning_rate: Callable[[int], float]
) -> None:
    if not math.isfinite(value):
        raise ConfigError(
            f"training diverged: the {what} is {value} at step {step} with learning-rate {learning_rate(step):g}, "
            "lower learning-rate."
        )
