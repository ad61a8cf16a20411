"""The held-out loss and joint error of a policy, the same number for the same weights on every run.

lerobot's own validation loss draws fresh noise and times and moves by several per cent between calls. Here both are
functions of the frame, so rounds can be compared, whatever the batch size and order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from app.dataset_meta import JOINTS
from app.frames import Frames
from app.policy import Processors

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    from app.prefix import Prefix
    from app.prefix_cache import PrefixCache

type Progress = Callable[[int, int], None]
"""Told frames done and frames in all; what it raises ends the evaluation."""

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
    frames: Frames,
    *,
    batch_size: int,
    batches: int,
    seed: int,
    cache: "PrefixCache | None" = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluate up to ``batch_size * batches`` of these frames, spread evenly over their episodes.

    Padding after an episode's end counts neither in the loss nor in the error. ``cache`` holds at least the rows that
    :func:`spread` names; without one the images are decoded. Raises DatasetError.
    """
    rows = spread(len(frames), batch_size * batches)
    return evaluate_rows(
        policy,
        processors,
        frames,
        rows,
        batch_size=batch_size,
        seed=seed,
        cache=cache,
        progress=progress,
    )


def spread(total: int, count: int) -> list[int]:
    """``count`` of ``total`` rows at even distances, or all of them when there are fewer."""
    count = min(total, count)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def evaluate_rows(
    policy: "SmolVLAPolicy",
    processors: Processors,
    frames: Frames,
    rows: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    cache: "PrefixCache | None" = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Evaluate these rows. Raises DatasetError."""
    import torch

    from app.prefix import compute

    losses: list[float] = []
    squares, valid = np.zeros(len(JOINTS)), 0
    device = torch.device(policy.config.device)
    with (
        torch.no_grad(),
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
    ):
        for start in range(0, len(rows), batch_size):
            chosen = rows[start : start + batch_size]
            windows, padding = frames.windows(chosen, policy.config.chunk_size)
            target, inside = frames.action[windows], ~padding
            batch = _inputs(processors, frames, chosen, target, images=cache is None)
            # All losses and predictions of a frame look at the same images.
            prefix = compute(policy, batch) if cache is None else cache.prefix(chosen)
            indices = frames.index[chosen].tolist()
            losses += _losses(policy, prefix, batch, inside, indices, seed)
            predicted = _predict(policy, processors, prefix, batch, indices, seed)
            error = (predicted - target) * inside[..., None]
            squares += np.square(error).sum(axis=(0, 1))
            valid += int(inside.sum())
            if progress:
                progress(start + len(chosen), len(rows))
    return EvalResult(
        # fsum rounds once, so the order of frames cannot show.
        loss=math.fsum(losses) / len(losses),
        frames=len(rows),
        rmse_deg=np.sqrt(squares / valid).tolist(),
    )


def _inputs(
    processors: Processors,
    frames: Frames,
    rows: Sequence[int],
    action: NDArray[np.float32],
    *,
    images: bool,
) -> dict[str, Any]:
    """What the preprocessor makes of these rows: on the device, normalised, the task as tokens."""
    import torch

    inputs: dict[str, Any] = {
        "observation.state": torch.from_numpy(frames.state[rows]),
        "action": torch.from_numpy(action),
        "task": [frames.tasks[task] for task in frames.task[rows]],
    }
    if images:
        # lerobot scales images before its preprocessor.
        inputs |= {
            camera: torch.from_numpy(pixels).float() / 255
            for camera, pixels in frames.images(rows).items()
        }
    batch: dict[str, Any] = processors[0](inputs)
    return batch


def _losses(
    policy: "SmolVLAPolicy",
    prefix: "Prefix",
    batch: dict[str, Any],
    inside: NDArray[np.bool_],
    indices: list[int],
    seed: int,
) -> list[float]:
    """Each frame's loss [frames], averaged over its times and over what is inside its episode."""
    import torch

    from app.prefix import flow_losses

    state, actions = batch["observation.state"], batch["action"]
    weight = torch.from_numpy(inside / inside.sum(axis=1, keepdims=True))
    total = torch.zeros(len(indices), dtype=torch.float64)
    for stratum in range(_TIMES):
        draws = [_draw(policy, index, stratum, seed) for index in indices]
        noise = torch.from_numpy(np.stack([noise for noise, _ in draws])).to(state.device)
        time = torch.tensor([time for _, time in draws], dtype=torch.float32, device=state.device)
        elements = flow_losses(policy, prefix, state, actions, noise, time)
        joints = elements[..., : len(JOINTS)].double().mean(dim=2).cpu()
        total += (joints * weight).sum(dim=1)
    return (total / _TIMES).tolist()


def _predict(
    policy: "SmolVLAPolicy",
    processors: Processors,
    prefix: "Prefix",
    batch: dict[str, Any],
    indices: list[int],
    seed: int,
) -> NDArray[np.float64]:
    """The action chunks [frames, chunk, 6] in degrees that the policy would send to the arm."""
    import torch

    from app.prefix import denoise

    state = batch["observation.state"]
    noise = np.stack([_draw(policy, index, _TIMES, seed)[0] for index in indices])
    predicted = denoise(policy, prefix, state, torch.from_numpy(noise).to(state.device))
    degrees: NDArray[np.float64] = processors[1](predicted).double().cpu().numpy()
    return degrees


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
