"""What a SmolVLA costs, from the shapes in its files: values, bytes a frame, arithmetic a frame. Nothing is loaded.

Arithmetic is counted in floating-point operations, two for each multiplication with an addition: all matrix products
and attention of :mod:`app.prefix`'s forward pass. A backward pass takes twice as much where weights are trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.policy import vlm_directory
from app.tensorfile import WEIGHTS, entries
from certs.errors import ModelError

_VLM = "model.vlm_with_expert.vlm."
_TEXT = f"{_VLM}model.text_model.layers."
_VISION = f"{_VLM}model.vision_model."
_EXPERT = "model.vlm_with_expert.lm_expert."
_PATCHES = f"{_VISION}embeddings.patch_embedding.weight"
_CONNECTOR = f"{_VLM}model.connector.modality_projection.proj.weight"
# lerobot's start and end of an image, where the policy has them.
_IMAGE_MARKS = 3
# Inputs and outputs of every layer, and what attention keeps, wait for the backward pass.
_BACKWARD = 3

type Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """The sizes of one SmolVLA.

    ``frozen`` and ``trained`` count values, of the VLM and of all the rest. Tokens are those of one camera's image.
    """

    shapes: Shapes
    frozen: int
    trained: int
    patches: int
    image_tokens: int
    chunk: int
    denoising_steps: int

    @classmethod
    def read(cls, base: Path) -> Self:
        """Take the sizes from a saved policy's files. Raises ModelError."""
        path = base / "config.json"
        try:
            config = json.loads(path.read_text())
            found, _ = entries(base / WEIGHTS)
            shapes = {name: entry.shape for name, entry in found.items()}
            height, width = config["resize_imgs_with_padding"]
            hidden, _, rows, columns = shapes[_PATCHES]
            patches = (height // rows) * (width // columns)
            # Pixel shuffle: so many patches side by side become one token.
            shuffled = shapes[_CONNECTOR][1] // hidden
            marks = _IMAGE_MARKS if config["add_image_special_tokens"] else 0
            frozen = sum(
                math.prod(shape) for name, shape in shapes.items() if name.startswith(_VLM)
            )
            return cls(
                shapes,
                frozen,
                sum(map(math.prod, shapes.values())) - frozen,
                patches,
                patches // shuffled + marks,
                config["chunk_size"],
                config["num_steps"],
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ModelError(
                f"{base} does not say how large its policy is ({error!r}): fetch or export the model again."
            ) from error

    @property
    def layers(self) -> int:
        """Layers of the VLM's text model that the policy uses."""
        return len(self._weights(_TEXT, "self_attn.k_proj"))

    def prefix_tokens(self, cameras: int, words: int) -> int:
        """Tokens of a frame's images and task."""
        return cameras * self.image_tokens + words

    def prefix_values(self, cameras: int, words: int) -> int:
        """Values of a frame's keys and values in all layers."""
        width = sum(shape[0] for shape in self._weights(_TEXT, "self_attn.[kv]_proj"))
        return self.prefix_tokens(cameras, words) * width

    def embedding_values(self, cameras: int) -> int:
        """Values of a frame's embedded images."""
        return cameras * self.image_tokens * self.shapes[_CONNECTOR][0]

    def vision(self, cameras: int) -> float:
        """Operations that embed a frame's images."""
        values = _values(self._weights(f"{_VISION}encoder.layers."))
        widths = self._weights(f"{_VISION}encoder.layers.", "self_attn.q_proj")
        one = 2 * (values + math.prod(self.shapes[_PATCHES])) * self.patches
        one += 2 * math.prod(self.shapes[_CONNECTOR]) * self.image_tokens
        return cameras * (one + _attention(widths, self.patches, self.patches))

    def text(self, tokens: int) -> float:
        """Operations that take a frame's embedded prefix through the VLM."""
        widths = self._weights(_TEXT, "self_attn.q_proj")
        return 2 * _values(self._weights(_TEXT)) * tokens + _attention(widths, tokens, tokens)

    def expert(self, tokens: int) -> float:
        """Operations of the expert's forward pass over a chunk of actions behind a prefix of so many tokens."""
        width = self.shapes["model.action_in_proj.weight"][0]
        total = 0.0
        for name, shape in self.shapes.items():
            if name.startswith(_VLM) or len(shape) < 2:
                continue
            # Every other layer projects the VLM's keys and values once more.
            known = re.search(r"[kv]_proj", name) and shape[1] != width
            total += 2 * math.prod(shape) * (tokens + 1 if known else self.chunk)
        # The state's token goes through the VLM.
        total += 2 * _values(self._weights(_TEXT))
        return total + _attention(
            self._weights(f"{_EXPERT}layers.", "self_attn.q_proj"), self.chunk, tokens + self.chunk
        )

    def training(self, tokens: int, *, adapters: int = 0) -> float:
        """Operations of a training step on one frame whose prefix is known; ``adapters`` are LoRA's values.

        Frozen weights have no gradients of their own: with adapters, and in the VLM, the backward pass is as long as
        the forward pass.
        """
        forward, vlm = self.expert(tokens), 2 * _values(self._weights(_TEXT))
        if adapters:
            return 2 * forward + _BACKWARD * 2 * adapters * self.chunk
        return _BACKWARD * forward - vlm

    def activations(self, tokens: int) -> int:
        """Values that a training step keeps of one frame until its backward pass."""
        linear = [
            sum(shape)
            for name, shape in self.shapes.items()
            if not name.startswith(_VLM) and len(shape) > 1
        ]
        context = sum(shape[0] for shape in self._weights(_TEXT, "self_attn.[kv]_proj"))
        return sum(linear) * self.chunk + context * (tokens + self.chunk)

    def largest(self) -> tuple[int, int]:
        """The outputs and inputs of the expert's largest layer."""
        outputs, inputs = max(self._weights(f"{_EXPERT}layers."), key=math.prod)
        return outputs, inputs

    def _weights(self, prefix: str, layer: str = ".*") -> list[tuple[int, ...]]:
        """The shapes of the matrices whose names begin so and, behind a layer's number, go on so."""
        pattern = re.compile(re.escape(prefix) + r"\d+\." + layer + r"\.weight")
        return [s for name, s in self.shapes.items() if len(s) > 1 and pattern.fullmatch(name)]


def words(base: Path, tasks: Iterable[str]) -> int:
    """Tokens of the longest of these task sentences. Raises ModelError."""
    from tokenizers import Tokenizer

    path = vlm_directory(base, online=False) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelError(f"{path} cannot be read ({error}): fetch the model again.") from error
    limit = json.loads((base / "config.json").read_text())["tokenizer_max_length"]
    # SmolVLA's preprocessor ends every task with a new line.
    counts = [len(tokenizer.encode(task.removesuffix("\n") + "\n").ids) for task in tasks]
    return min(max(counts), int(limit))


def _values(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))


def _attention(queries: Iterable[tuple[int, ...]], length: int, keys: int) -> float:
    """Operations of attention in layers whose queries are as wide as these projections put out."""
    return sum(4 * shape[0] * length * keys for shape in queries)
