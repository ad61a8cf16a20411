"""The cached path gives what lerobot's own forward pass gives: losses, gradients and actions."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from app.policy import CAMERAS, load_policy, load_processors, trainable_tensors

if TYPE_CHECKING:
    import torch

# Of different length in tokens, so that one of them is padded beside the other.
TASKS = ("Pick up the cube and place it in the box.", "Grasp the brick.")
# Float32 keeps 1.2e-7; what differs is the order of sums. Largest seen: 1.1e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


def _batch(tiny_base: Path, policy: Any, cameras: int, size: int = 5) -> dict[str, Any]:
    """What the preprocessor makes of random frames, with the tasks in turn."""
    import torch

    moments = {"mean": np.full(6, 3.0), "std": np.full(6, 20.0)}
    pre, _ = load_processors(
        tiny_base, policy, dict.fromkeys(("observation.state", "action"), moments)
    )
    random = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = pre(
        {
            **{
                camera: torch.rand(size, 3, 48, 64, generator=random)
                for camera in list(CAMERAS)[:cameras]
            },
            "observation.state": 30 * torch.randn(size, 6, generator=random),
            "action": 30 * torch.randn(size, 50, 6, generator=random),
            "task": [TASKS[row % 2] for row in range(size)],
        }
    )
    return batch


def _draws(policy: Any, size: int) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    random = torch.Generator().manual_seed(1)
    noise = torch.randn(size, 50, policy.config.max_action_dim, generator=random)
    return noise, torch.rand(size, generator=random)


def _variant(policy: Any, **changes: Any) -> Any:
    """Another policy over the same VLM, with random weights."""
    import torch
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    config = copy.deepcopy(policy.config)
    config.load_vlm_weights = False
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return SmolVLAPolicy(config).float()


def _worst(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The relative error in the norm of all elements."""
    return float((found - expected).detach().norm() / expected.detach().norm())


def _gradients(policy: Any, losses: Any) -> "dict[str, torch.Tensor]":
    """Of the mean loss of the real joints, for each tensor that it reaches."""
    losses[..., :6].mean().backward()
    found = {name: p.grad for name, p in trainable_tensors(policy).items() if p.grad is not None}
    policy.zero_grad()
    return found


def _require_equal(policy: Any, batch: dict[str, Any]) -> None:
    """Losses, gradients of every trainable tensor and actions are those of lerobot's own code."""
    import torch

    from app import prefix

    noise, time = _draws(policy, len(batch["action"]))
    policy.train()
    images, masks = policy.prepare_images(batch)
    expected = policy.model.forward(
        images,
        masks,
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
        policy.prepare_action(batch),
        noise,
        time,
    )
    gradients = _gradients(policy, expected)

    computed = prefix.compute(policy, batch)
    losses = prefix.flow_losses(
        policy, computed, batch["observation.state"], batch["action"], noise, time
    )
    assert losses.shape == expected.shape
    assert _worst(losses, expected) <= TOLERANCE
    found = _gradients(policy, losses)
    assert found.keys() == gradients.keys()
    assert len(found) > 20
    errors = {name: _worst(found[name], gradients[name]) for name in found}
    assert max(errors.values()) <= TOLERANCE, errors

    actions = prefix.denoise(policy, computed, batch["observation.state"], noise)
    expected = policy.predict_action_chunk(dict(batch), noise=noise)
    assert actions.shape == expected.shape == (len(noise), 50, 6)
    assert _worst(actions, expected) <= TOLERANCE
    assert torch.isfinite(computed.kv).all()


@pytest.mark.parametrize("cameras", [1, 2, 3])
def test_equals_lerobot(tiny_base: Path, policy: Any, cameras: int) -> None:
    batch = _batch(tiny_base, policy, cameras)
    assert policy.config.pad_language_to == "max_length"
    _require_equal(policy, batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_image_special_tokens": True},
        {"prefix_length": 100},
        {"num_expert_layers": 2, "self_attn_every_n_layers": 0},
        {"self_attn_every_n_layers": 0},
        {"self_attn_every_n_layers": 3},
        {"attention_mode": "self_attn"},
        {"empty_cameras": 1},
    ],
    ids=str,
)
def test_equals_lerobot_in_its_other_settings(
    tiny_base: Path, policy: Any, changes: dict[str, Any]
) -> None:
    other = _variant(policy, **changes)
    _require_equal(other, _batch(tiny_base, other, cameras=2))


def test_padding_that_no_frame_needs_is_dropped(tiny_base: Path, policy: Any) -> None:
    from app import prefix

    batch = _batch(tiny_base, policy, cameras=2)
    mask = batch["observation.language.attention_mask"]
    computed = prefix.compute(policy, batch)
    images = prefix.embed_images(policy, batch)
    assert images.shape == (5, 8, 64)  # two cameras of four tokens
    longest = int(mask.sum(1).max())
    assert computed.mask.shape == (5, 8 + longest)
    assert computed.mask.sum(1).tolist() == (8 + mask.sum(1)).tolist()
    assert computed.kv.shape == (5, 4, 2, 8 + longest, 2, 16)
    # All of the padding gives the same keys and values of the tokens that are real.
    whole = prefix.from_embeddings(policy, images, batch["observation.language.tokens"], mask)
    assert whole.kv.shape[3] == 8 + mask.shape[1]
    for row, real in enumerate(computed.mask):
        found = computed.kv[row][:, :, real]
        assert _worst(whole.kv[row][:, :, whole.mask[row]], found) <= 1e-6


def test_nothing_of_the_prefix_is_trained(tiny_base: Path, policy: Any) -> None:
    import torch

    from app import prefix

    batch = _batch(tiny_base, policy, cameras=2)
    before = prefix.compute(policy, batch)
    assert not before.kv.requires_grad
    assert before.kv.dtype == torch.float32
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in trainable_tensors(other).values():
            parameter.mul_(2)
    assert torch.equal(prefix.compute(other, batch).kv, before.kv)
    # Nor does it depend on the caller's precision.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prefix.compute(policy, batch).kv, before.kv)


def test_runs_under_autocast(tiny_base: Path, policy: Any) -> None:
    """As on a GPU: the frozen tensors bfloat16, the trained ones float32 masters, autocast to bfloat16."""
    import torch

    from app import prefix

    half = copy.deepcopy(policy)
    for parameter in half.model.vlm_with_expert.vlm.parameters():
        parameter.data = parameter.data.bfloat16()
    batch = _batch(tiny_base, policy, cameras=2)
    noise, time = _draws(policy, 5)
    state, action = batch["observation.state"], batch["action"]
    images, masks = half.prepare_images(batch)
    inputs = (state, action, noise, time)
    with torch.autocast("cpu", torch.bfloat16):
        computed = prefix.compute(half, batch)
        losses = prefix.flow_losses(half, computed, *inputs)
        stock = half.model.forward(
            images,
            masks,
            batch["observation.language.tokens"],
            batch["observation.language.attention_mask"],
            half.prepare_state(batch),
            half.prepare_action(batch),
            noise,
            time,
        )
    assert computed.kv.dtype == torch.bfloat16
    assert {p.dtype for p in _gradients(half, losses).values()} == {torch.float32}
    exact = prefix.flow_losses(policy, prefix.compute(policy, batch), *inputs)
    # No further from the float32 loss than lerobot is, which rounds to bfloat16 in other places.
    assert _worst(losses, exact) <= 2 * _worst(stock, exact)
    assert _worst(losses, exact) <= 0.02


def test_compiles_to_one_graph(tiny_base: Path, policy: Any) -> None:
    import torch

    from app import prefix

    batch = _batch(tiny_base, policy, cameras=2)
    inputs = (
        policy,
        prefix.compute(policy, batch),
        batch["observation.state"],
        batch["action"],
        *_draws(policy, 5),
    )
    torch._dynamo.reset()
    compiled: Any = torch.compile(prefix.flow_losses, fullgraph=True, backend="eager")
    losses = compiled(*inputs)
    expected = prefix.flow_losses(*inputs)
    assert torch.equal(losses, expected)
    found, gradients = _gradients(policy, losses), _gradients(policy, expected)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in found)


def test_says_when_the_prefix_is_not_constant(policy: Any) -> None:
    from app import prefix

    assert prefix.unfit(policy) is None
    assert prefix.unfit(_variant(policy, train_expert_only=False)) == "train_expert_only is false"
    other = copy.deepcopy(policy)
    name, parameter = next(iter(other.model.vlm_with_expert.vlm.named_parameters()))
    parameter.requires_grad_(True)
    assert prefix.unfit(other) == f"the VLM's {name} is trained"
