"""Adapters that begin alike everywhere, change what peft's would, and are the policy once merged."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from app import payload, tensorfile, trainables
from app.config import RunConfig
from app.policy import frozen_hash, load_policy, load_processors, trainable_names, trainable_tensors
from benchmarks import shapes
from certs.errors import ModelError

if TYPE_CHECKING:
    import torch

LORA = RunConfig(exchange="lora")


@pytest.fixture
def policy(tiny_base: Path) -> Any:
    return load_policy(tiny_base, "cpu")


def _fill(policy: Any, base: Path) -> dict[str, Any]:
    """Put adapters that change something into an adapted policy; returns them as the wire has them."""
    import torch

    random = np.random.default_rng(0)
    filled = {}
    with torch.no_grad():
        for name, array in trainables.initial(LORA, base).items():
            filled[name] = array if array.any() else random.normal(0, 0.1, array.shape)
            filled[name] = filled[name].astype(np.float32)
            policy.get_parameter(name).copy_(torch.from_numpy(filled[name]))
    return filled


def _batch(base: Path, policy: Any) -> "tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]":
    """A preprocessed batch of three with two cameras, noise and times."""
    import torch

    neutral = {
        key: {"mean": np.zeros(6), "std": np.ones(6)} for key in ("observation.state", "action")
    }
    pre, _ = load_processors(base, policy, neutral)
    random = torch.Generator().manual_seed(0)
    batch = pre(
        {
            "observation.images.top": torch.rand(3, 3, 96, 128, generator=random),
            "observation.images.wrist": torch.rand(3, 3, 96, 128, generator=random),
            "observation.state": torch.rand(3, 6, generator=random),
            "action": torch.rand(3, 50, 6, generator=random),
            "task": ["Pick up the cube."] * 3,
        }
    )
    return batch, torch.randn(3, 50, 32, generator=random), torch.rand(3, generator=random)


def test_the_layers_are_lerobots_default(tiny_base: Path, policy: Any) -> None:
    import re

    pattern = policy._get_default_peft_targets()["target_modules"]
    # peft takes a module whose whole name matches.
    expected = {name for name, _ in policy.named_modules() if re.fullmatch(pattern, name)}
    found = trainables.targets(tiny_base)
    assert set(found) == expected
    for name, shape in found.items():
        assert policy.get_submodule(name).weight.shape == shape


def test_the_real_model_sends_three_megabytes() -> None:
    adapted = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.SHAPES.items()
        if name.endswith(".weight") and trainables.is_target(name.removesuffix(".weight"))
    }
    fresh = trainables.Adapters(adapted, LORA.lora_rank, LORA.seed)
    values = sum(map(math.prod, fresh.shapes.values()))
    assert (len(fresh), values * 4) == (74, 2_970_624)


def test_adapters_begin_with_the_same_bytes_in_every_process(tiny_base: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app import payload, trainables;"
        "from app.config import RunConfig;"
        "config = RunConfig(exchange='lora');"
        "print(payload.canonical_hash(trainables.initial(config, Path(sys.argv[1]))),"
        " trainables.frozen(config, Path(sys.argv[1])));"
        "assert not {'torch', 'lerobot', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base)], capture_output=True, text=True, check=True
    )
    model, frozen = done.stdout.split()
    assert model == payload.canonical_hash(trainables.initial(LORA, tiny_base))
    assert frozen == trainables.frozen(LORA, tiny_base)
    # On every machine, and in every release: a federation begins with this.
    assert model.startswith("6b16400e7b0040be")


def test_adapters_begin_as_pefts_do(tiny_base: Path) -> None:
    fresh = trainables.initial(LORA, tiny_base)
    for name, array in fresh.items():
        assert array.dtype == np.float32
        if name.endswith("lora_B.weight"):
            assert array.shape[1] == LORA.lora_rank
            assert not array.any()
            continue
        rank, inputs = array.shape
        assert rank == LORA.lora_rank
        bound = inputs**-0.5
        assert 0.95 * bound < np.abs(array).max() <= bound
        # Uniform: the deviation of 16 times 32 values or more is within 5 % of bound / sqrt(3).
        assert float(array.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    # No two layers' are alike, nor another seed's.
    first, second, *_ = [array for name, array in fresh.items() if name.endswith("lora_A.weight")]
    assert not np.array_equal(first.reshape(-1)[:100], second.reshape(-1)[:100])
    other = trainables.initial(RunConfig(exchange="lora", seed=1), tiny_base)
    assert not np.array_equal(
        other["model.state_proj.lora_A.weight"], fresh["model.state_proj.lora_A.weight"]
    )


def test_attached_zeros_change_nothing_and_are_all_that_trains(
    tiny_base: Path, policy: Any
) -> None:
    import torch

    from app import lora

    batch, noise, time = _batch(tiny_base, policy)
    state = torch.get_rng_state()
    before, _ = policy.forward(dict(batch), noise, time)
    lora.attach(policy, LORA.lora_rank)
    after, _ = policy.forward(dict(batch), noise, time)
    assert torch.equal(before, after)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = trainables.initial(LORA, tiny_base)
    found = trainable_tensors(policy)
    assert list(found) == sorted(fresh)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == fresh.shapes
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    after.backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_layer_is_the_changed_weight(bias: bool) -> None:
    import torch

    from app.lora import LoRALinear

    random = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    adapted = LoRALinear(layer, 4)
    assert adapted.weight is layer.weight
    assert adapted.weight.dtype == torch.float64
    adapted.double()
    a = torch.randn(4, 24, generator=random, dtype=torch.float64).requires_grad_()
    b = torch.randn(40, 4, generator=random, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        adapted.lora_A.weight.copy_(a)
        adapted.lora_B.weight.copy_(b)
    x = torch.randn(2, 5, 24, generator=random, dtype=torch.float64)
    # alpha is 8, whatever the rank.
    expected = torch.nn.functional.linear(x, layer.weight + 8 / 4 * (b @ a), layer.bias)
    torch.testing.assert_close(adapted(x), expected)
    found = (adapted.lora_A.weight, adapted.lora_B.weight)
    torch.testing.assert_close(
        torch.autograd.grad(adapted(x).square().sum(), found),
        torch.autograd.grad(expected.square().sum(), (a, b)),
    )
    assert not layer.weight.requires_grad


def test_merged_weights_compute_what_the_adapters_do(tiny_base: Path, policy: Any) -> None:
    import torch

    from app import lora

    merged = load_policy(tiny_base, "cpu")
    batch, noise, _ = _batch(tiny_base, policy)
    with torch.no_grad():
        base = policy.predict_action_chunk(dict(batch), noise=noise)
        lora.attach(policy, LORA.lora_rank)
        adapters = _fill(policy, tiny_base)
        for name, weight in trainables.merged(tiny_base, adapters):
            merged.get_parameter(name).copy_(torch.from_numpy(weight))
        found = merged.predict_action_chunk(dict(batch), noise=noise)
        expected = policy.predict_action_chunk(dict(batch), noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.01


def test_the_prefix_stays_a_constant_of_the_frame(tiny_base: Path, policy: Any) -> None:
    import torch

    from app import lora, prefix

    lora.attach(policy, LORA.lora_rank)
    _fill(policy, tiny_base)
    assert prefix.unfit(policy) is None
    batch, noise, time = _batch(tiny_base, policy)
    found = trainable_tensors(policy)

    def gradients(loss: "torch.Tensor") -> "list[torch.Tensor]":
        return list(torch.autograd.grad(loss, list(found.values())))

    stock, _ = policy.forward(dict(batch), noise, time, reduction="none")
    expected = gradients(stock.sum())
    known = prefix.compute(policy, batch)

    def losses() -> "torch.Tensor":
        return prefix.flow_losses(
            policy, known, batch["observation.state"], batch["action"], noise, time
        )[:, :, :6].mean((1, 2))

    step: Callable[[], torch.Tensor]
    for step in (losses, torch.compile(losses, fullgraph=True, backend="eager")):
        ours = step()
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)
        for name, mine, theirs in zip(found, gradients(ours.sum()), expected, strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_what_stays_at_home_includes_the_expert(tiny_base: Path, tmp_path: Path) -> None:
    """Adapters of one expert on another would be noise: sites must have the same."""
    other = tmp_path / "other"
    other.mkdir()
    names = trainable_names(tiny_base)
    tensors = dict(tensorfile.read(tiny_base / "model.safetensors", names))
    tensors[names[0]] = tensors[names[0]] + np.float32(1)
    tensorfile.write(other / "model.safetensors", tensors, base=tiny_base / "model.safetensors")
    expert = RunConfig()
    assert trainables.frozen(expert, other) == frozen_hash(tiny_base)
    assert trainables.frozen(LORA, other) != trainables.frozen(LORA, tiny_base)
    assert trainables.frozen(LORA, tiny_base) != frozen_hash(tiny_base)


def test_a_file_without_the_layers_is_refused(tmp_path: Path) -> None:
    tensorfile.write(tmp_path / "model.safetensors", {"other.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(ModelError, match="none of the layers that exchange=lora adapts") as caught:
        trainables.initial(LORA, tmp_path)
    assert "\n" not in str(caught.value)
