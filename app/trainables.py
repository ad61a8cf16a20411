"""What is trained and crosses the wire, by name: the action expert's tensors, or low-rank adapters of them.

LoRA (Hu et al. 2021, arXiv:2106.09685): a layer's weight W stays as the base has it and becomes
W + alpha/r * B A, of which A (r, inputs) and B (outputs, r) are trained. Layers, alpha and initial
values are those of lerobot and of peft, which it uses; so are the names. Nothing here needs torch:
the ServerApp begins with the same bytes as every site, and merges what it combined.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app.config import RunConfig
from app.payload import Tensors
from app.policy import frozen_hash, trainable_names
from app.tensorfile import ADAPTERS, WEIGHTS, Lazy, entries
from certs.errors import ModelError

# The file of a checkpoint that holds what crosses the wire, by the run config's exchange.
FILES = {"expert": WEIGHTS, "lora": ADAPTERS}
# lerobot.configs.default.PeftConfig leaves it to peft, whose LoraConfig has 8 whatever the rank.
ALPHA = 8
# SmolVLAPolicy._get_default_peft_targets of lerobot 0.6.1, for a whole module name.
_TARGETS = re.compile(
    r"(model\.vlm_with_expert\.lm_expert\..*\.(q|v)_proj"
    r"|model\.(state_proj|action_in_proj|action_out_proj|action_time_mlp_in|action_time_mlp_out))"
)
_WEIGHT = ".weight"
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Adapters(Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]):
    """Adapters as a run begins: A uniform within 1/sqrt(inputs), B zero; drawn at each access.

    So peft begins too, from another stream: each tensor has its own, named by ``seed`` and the
    tensor. Whole numbers scaled by a float32 are the same bytes on every machine.
    """

    def __init__(self, targets: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> None:
        self._seed = seed
        self.shapes: dict[str, tuple[int, ...]] = {}
        for layer, (outputs, inputs) in targets.items():
            self.shapes |= {layer + _A: (rank, inputs), layer + _B: (outputs, rank)}

    def __getitem__(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        shape = self.shapes[name]
        if name.endswith(_B):
            return np.zeros(shape, np.float32)
        digest = hashlib.sha256(f"lora/{self._seed}/{name}".encode()).digest()
        stream = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
        # kaiming_uniform_ with a = sqrt(5), in peft's words; a root rounds alike everywhere.
        bound = np.float32(1 / math.sqrt(shape[1]))
        return (stream.random(shape, dtype=np.float32) * 2 - 1) * bound

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def initial(config: RunConfig, base: Path) -> Lazy | Adapters:
    """The tensors that a run trains, as round 0 has them; the same bytes at the SuperLink and every site."""
    if config.exchange == "lora":
        return Adapters(targets(base), config.lora_rank, config.seed)
    return Lazy(base / WEIGHTS, trainable_names(base))


def frozen(config: RunConfig, base: Path) -> str:
    """sha256 over the base's tensors that are at every site and never cross the wire.

    Adapters mean nothing without the expert they were trained on, which then stays at home too.
    """
    return frozen_hash(base, expert=config.exchange == "lora")


def is_target(layer: str) -> bool:
    """Whether LoRA adapts the layer of this name."""
    return _TARGETS.fullmatch(layer) is not None


def targets(base: Path) -> dict[str, tuple[int, ...]]:
    """The layers of ``base`` that LoRA adapts, sorted: each one's name, and its (outputs, inputs)."""
    found, _ = entries(base / WEIGHTS)
    layers = {
        name.removesuffix(_WEIGHT): found[name].shape
        for name in sorted(found)
        if name.endswith(_WEIGHT) and is_target(name.removesuffix(_WEIGHT))
    }
    if not layers:
        raise ModelError(
            f"{base / WEIGHTS} has none of the layers that exchange=lora adapts: "
            "fetch or export the model again."
        )
    return layers


def merged_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of ``base`` that :func:`merged` changes, and their shapes."""
    return {layer + _WEIGHT: shape for layer, shape in targets(base).items()}


def merged(
    base: Path, adapters: Tensors
) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The adapted layers' weights with ``adapters`` merged in, one in memory at a time."""
    weights = Lazy(base / WEIGHTS, merged_shapes(base))
    for name in weights:
        layer = name.removesuffix(_WEIGHT)
        a, b = adapters[layer + _A], adapters[layer + _B]
        # float64, rounded once: no order of summation of some machine's is in the result.
        change = scale(len(a)) * (b.astype(np.float64) @ a.astype(np.float64))
        yield name, np.asarray(weights[name] + change, np.float32)


def scale(rank: int) -> float:
    """What an adapter's product is multiplied with."""
    return ALPHA / rank
