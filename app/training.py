"""Local training at a site: lerobot's sampler, processors, loss and optimiser settings, for a given number of steps."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from app.dataset import SiteDataset, readable
from app.policy import CAMERAS, Processors, trainable_tensors
from certs.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy


@dataclass(frozen=True)
class TrainResult:
    """What a site reports: frames drawn, losses, mean gradient norm before clipping, wall-clock seconds."""

    frames: int
    mean_loss: float
    last_loss: float
    grad_norm: float
    seconds: float


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
) -> TrainResult:
    """Take ``steps`` optimiser steps on the training episodes; the policy's trainable tensors change in place.

    ``learning_rate`` is asked with the run's step, from ``global_step`` on, so a round does not warm up again. The
    order of frames and the flow-matching noise are functions of ``seed`` and ``global_step`` alone. ``progress`` is
    told step (from 1) and loss. Raises DatasetError for unreadable or non-finite data, ConfigError when the loss
    diverges; in both cases before the step that would have poisoned the weights.
    """
    import torch

    started = time.perf_counter()
    preset = policy.config.get_optimizer_preset()
    parameters = list(trainable_tensors(policy).values())
    optimizer = preset.build(parameters)
    device = torch.device(policy.config.device)
    opened = dataset.lerobot(dataset.train_episodes, policy.config.chunk_size)
    batches = _batches(opened, dataset, batch_size=batch_size, seed=seed, global_step=global_step)
    frames, loss_sum, norm_sum, last_loss = 0, 0.0, 0.0, math.nan
    policy.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_noise_seed(seed, global_step))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(global_step + step)
            batch = next(batches)
            size = len(batch["index"])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = policy.forward(processors[0](batch))
            last_loss = loss.item()
            _require_finite(last_loss, "loss", global_step + step, learning_rate)
            loss.backward()
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
        grad_norm=norm_sum / steps,
        seconds=time.perf_counter() - started,
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


def _noise_seed(seed: int, global_step: int) -> int:
    # 63 bits, so that it is a valid seed for every torch generator.
    return (
        int.from_bytes(sha256(f"train/{seed}/{global_step}".encode()).digest()[:8], "little") >> 1
    )


def _require_finite(
    value: float, what: str, step: int, learning_rate: Callable[[int], float]
) -> None:
    if not math.isfinite(value):
        raise ConfigError(
            f"training diverged: the {what} is {value} at step {step} with learning-rate {learning_rate(step):g}, "
            "lower learning-rate."
        )
