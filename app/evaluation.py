"""The held-out loss and joint error of a policy, the same number for the same weights on every run.

lerobot's own validation loss draws fresh noise and times and moves by several per cent between calls. Here both are
functions of the frame, so rounds can be compared, whatever the batch size and order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.dataset import SiteDataset, readable
from app.dataset_meta import JOINTS
from app.policy import Processors
from app.training import require_finite_rows, to_batch

if TYPE_CHECKING:
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

# Flow-matching times per frame, one in each quarter of the distribution that training draws from.
_TIMES = 4
# SmolVLA trains on times 0.999 * Beta(1.5, 1) + 0.001 (lerobot's VLAFlowMatching.sample_time).
_ALPHA, _SCALE, _OFFSET = 1.5, 0.999, 0.001


@dataclass(frozen=True)
class EvalResult:
    """Mean flow-matching loss, number of frames, and each joint's RMSE in degrees (per cent for the gripper)."""

    loss: float
    frames: int
    rmse_deg: list[float]


def evaluate(
    policy: "SmolVLAPolicy",
    processors: Processors,
    dataset: SiteDataset,
    *,
    batch_size: int,
    batches: int,
    seed: int,
) -> EvalResult:
    """Evaluate up to ``batch_size * batches`` frames, spread evenly over the held-out episodes.

    Padding after an episode's end counts neither in the loss nor in the error. Raises DatasetError.
    """
    opened = dataset.lerobot(dataset.held_out_episodes, policy.config.chunk_size)
    rows = spread(len(opened), batch_size * batches)
    return evaluate_rows(
        policy, processors, dataset, opened, rows, batch_size=batch_size, seed=seed
    )


def spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` rows at even distances, or all of them when there are fewer."""
    count = min(total, count)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def evaluate_rows(
    policy: "SmolVLAPolicy",
    processors: Processors,
    dataset: SiteDataset,
    opened: "LeRobotDataset",
    rows: Sequence[int],
    *,
    batch_size: int,
    seed: int,
) -> EvalResult:
    """Evaluate these rows of an opened dataset. Raises DatasetError."""
    import torch

    losses: list[float] = []
    squares, valid = np.zeros(len(JOINTS)), 0
    device = torch.device(policy.config.device)
    was_training = policy.training
    policy.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        for start in range(0, len(rows), batch_size):
            with readable(dataset):
                batch = to_batch([opened[row] for row in rows[start : start + batch_size]])
            require_finite_rows(batch, dataset)
            frames: list[int] = batch["index"].tolist()
            target, inside = batch["action"].double(), ~batch["action_is_pad"]
            batch = processors[0](batch)
            losses += _losses(policy, batch, frames, seed)
            predicted = _predict(policy, processors, batch, frames, seed)
            error = (predicted.double() - target) * inside[..., None]
            squares += error.square().sum(dim=(0, 1)).numpy()
            valid += int(inside.sum())
    policy.train(was_training)
    return EvalResult(
        # fsum rounds once, so the order of frames cannot show.
        loss=math.fsum(losses) / len(losses),
        frames=len(rows),
        rmse_deg=np.sqrt(squares / valid).tolist(),
    )


def _losses(
    policy: "SmolVLAPolicy", batch: dict[str, Any], frames: list[int], seed: int
) -> list[float]:
    """Each frame's loss [frames], averaged over its times."""
    import torch

    total = torch.zeros(len(frames), dtype=torch.float64)
    for stratum in range(_TIMES):
        draws = [_draw(policy, frame, stratum, seed) for frame in frames]
        noise = torch.from_numpy(np.stack([noise for noise, _ in draws])).to(policy.config.device)
        time = torch.tensor(
            [time for _, time in draws], dtype=torch.float32, device=policy.config.device
        )
        loss, _ = policy.forward(dict(batch), noise, time, reduction="none")
        total += loss.double().cpu()
    return (total / _TIMES).tolist()


def _predict(
    policy: "SmolVLAPolicy",
    processors: Processors,
    batch: dict[str, Any],
    frames: list[int],
    seed: int,
) -> "torch.Tensor":
    """The action chunks [frames, chunk, 6] in degrees that the policy would send to the arm."""
    import torch

    noise = np.stack([_draw(policy, frame, _TIMES, seed)[0] for frame in frames])
    start = torch.from_numpy(noise).to(policy.config.device)
    predicted: torch.Tensor = processors[1](policy.predict_action_chunk(dict(batch), noise=start))
    return predicted


def _draw(
    policy: "SmolVLAPolicy", frame: int, stratum: int, seed: int
) -> tuple[NDArray[np.float32], float]:
    """Noise [chunk, max_action_dim] and a time in this stratum, both functions of the arguments alone."""
    digest = sha256(f"evaluate/{seed}/{frame}/{stratum}".encode()).digest()
    # numpy's stream is the same on every machine; torch's differs between instruction sets.
    random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    noise = random.standard_normal(
        (policy.config.chunk_size, policy.config.max_action_dim), dtype=np.float32
    )
    # Beta(a, 1) has the distribution function t^a.
    quantile = (stratum + random.random()) / _TIMES
    return noise, float(quantile ** (1 / _ALPHA) * _SCALE + _OFFSET)
