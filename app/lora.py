"""LoRA in a site's policy: adapters beside the layers that lerobot adapts, and nothing else trained."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from app import trainables

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy


class LoRALinear(nn.Linear):
    """A frozen linear layer and a trained low-rank change of its weight, which is never formed.

    ``weight`` stays the base's, and the adapters carry peft's names: ``lora_A.weight`` (rank, inputs) and
    ``lora_B.weight`` (outputs, rank), float32. They begin as zeros.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        # On no device: the layer's own parameters take the place of these.
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.lora_A = _adapter(layer.in_features, rank, layer)
        self.lora_B = _adapter(rank, layer.out_features, layer)
        self.scale = trainables.scale(rank)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """``input`` (..., inputs) through the layer and its adapter, (..., outputs)."""
        frozen = functional.linear(input, self.weight, self.bias)
        change: Tensor = self.lora_B(self.lora_A(input))
        return frozen + change * self.scale


def attach(policy: "SmolVLAPolicy", rank: int) -> None:
    """Freeze ``policy`` and adapt the layers that lerobot adapts, in place.

    The adapters are its trainable tensors from then on; as zeros they leave it as it was, and wait to be filled.
    """
    policy.requires_grad_(False)
    for name, layer in list(policy.named_modules()):
        if trainables.is_target(name):
            parent, _, child = name.rpartition(".")
            setattr(policy.get_submodule(parent), child, LoRALinear(layer, rank))


def _adapter(inputs: int, outputs: int, layer: nn.Linear) -> nn.Linear:
    # First on no device: nn.Linear would draw values, and so move torch's generator on.
    adapter = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.float32)
    adapter.to_empty(device=layer.weight.device)
    nn.init.zeros_(adapter.weight)
    return adapter
