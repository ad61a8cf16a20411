"""The site's optimiser: lerobot's AdamW, the moments that it carries from round to round, and FedProx's pull."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

# AdamW's two moments, in torch's words.
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerState:
    """AdamW between two rounds: its steps so far, and ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of each tensor.

    A tensor that no gradient reaches has no moments.
    """

    step: int
    tensors: Mapping[str, NDArray[np.float32]]


def adamw(
    preset: Any,
    trainable: "Mapping[str, torch.Tensor]",
    state: OptimizerState | None,
) -> "torch.optim.AdamW":
    """lerobot's AdamW (``preset.build``), all tensors in one kernel, with these moments."""
    import torch

    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=preset.lr,
        betas=preset.betas,
        eps=preset.eps,
        weight_decay=preset.weight_decay,
        fused=True,
    )
    for name, parameter in trainable.items():
        if state and f"{_MOMENTS[0]}.{name}" in state.tensors:
            # Copies, for AdamW changes them in place.
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=parameter.device),
                **{
                    kind: torch.tensor(state.tensors[f"{kind}.{name}"], device=parameter.device)
                    for kind in _MOMENTS
                },
            }
    return optimizer


def moments(
    optimizer: "torch.optim.Optimizer", trainable: "Mapping[str, torch.Tensor]"
) -> OptimizerState:
    """The moments as they are now, in host memory; on a CPU the optimiser's own."""
    step, tensors = 0, {}
    for name, parameter in trainable.items():
        if state := optimizer.state.get(parameter):
            step = int(state["step"])
            for kind in _MOMENTS:
                tensors[f"{kind}.{name}"] = state[kind].cpu().numpy()
    return OptimizerState(step, tensors)


def forget_incomplete(optimizer: "torch.optim.Optimizer") -> None:
    """Remove moments that the end of memory kept AdamW from making whole: it would not complete them."""
    for parameter, state in list(optimizer.state.items()):
        # Beside them it counts the steps.
        if len(state) <= len(_MOMENTS):
            del optimizer.state[parameter]


def pull(
    parameters: "list[torch.Tensor]", anchors: "list[torch.Tensor]", mu: float
) -> "torch.Tensor":
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
    return squares * (mu / 2)
