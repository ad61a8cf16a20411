"""The federation's model between rounds: taken up from a checkpoint, changed by a commit, sent out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from app import payload, server_optimizer, trainables
from app.aggregation import Updates
from app.broadcast import Broadcast
from app.checkpoint import SERVER, UPDATE, Checkpoint, round_directory
from app.config import RunConfig, models_directory
from app.payload import Payload, PayloadError
from app.policy import resolve_model
from app.tensorfile import Lazy

_log = logging.getLogger("flwr")

# The error feedback of the broadcast, a state of the server's beside its optimiser's.
_RESIDUAL = "residual"


class Model:
    """Trainable tensors on disk, one of which is in memory at a time; at first the base's."""

    def __init__(self, config: RunConfig, checkpoints: Path) -> None:
        self._config, self._checkpoints = config, checkpoints
        self._base = resolve_model(config.model, models_directory())
        self.frozen = trainables.frozen(config, self._base)
        initial = trainables.initial(config, self._base)
        self.shapes, self._tensors = initial.shapes, initial
        self.hash = payload.canonical_hash(self._tensors)
        self.broadcast = Broadcast(self._tensors, self.hash, self.frozen, None)
        # What the server keeps of each tensor between rounds.
        optimizer = server_optimizer.STATE[config.strategy]
        self._states = (*optimizer, _RESIDUAL) if config.codec != "fp32" else optimizer
        self._kept: Lazy | None = None

    def describe(self) -> dict[str, Any]:
        """The base model and what of it is trained, for the record of the run."""
        config = self._config
        lora = {"lora_rank": config.lora_rank, "lora_alpha": trainables.ALPHA}
        return {
            "name": config.model,
            "hash": self.hash,
            "frozen": self.frozen,
            "trainable_tensors": len(self.shapes),
            "trainable_values": sum(math.prod(shape) for shape in self.shapes.values()),
            **(lora if config.exchange == "lora" else {}),
        }

    def take_up(self, checkpoint: Path, model: str) -> None:
        """Go on from ``checkpoint``, whose canonical hash is ``model``."""
        self.hash = model
        self._tensors = Lazy(checkpoint / trainables.FILES[self._config.exchange], self.shapes)
        names = [f"{state}.{name}" for state in self._states for name in self.shapes]
        self._kept = Lazy(checkpoint / SERVER, names) if names else None
        update = None
        if (checkpoint / UPDATE).exists():
            try:
                update = Payload.open(checkpoint / UPDATE)
            except PayloadError as error:
                _log.warning("sites get the whole model, %s is damaged: %s", UPDATE, error)
        self.broadcast = Broadcast(self._tensors, model, self.frozen, update)

    def updates(self, folder: Path) -> Updates:
        """A place for this round's updates of this model."""
        return Updates(
            folder,
            self.shapes,
            base_hash=self.hash,
            frozen_hash=self.frozen,
            norm_bound=self._config.norm_bound,
        )

    def commit(
        self,
        number: int,
        updates: Updates | None,
        normalisation: Mapping[str, Mapping[str, Any]],
        federation: Mapping[str, Any],
    ) -> Path:
        """Combine ``updates``, write round ``number`` and take it up; without updates, as it is."""
        with Checkpoint(
            self._checkpoints,
            number,
            base=self._base,
            shapes=self.shapes,
            states=self._states,
            normalisation=normalisation,
            exchange=self._config.exchange,
        ) as checkpoint:
            parts: list[tuple[str, tuple[int, ...], bytes]] = []
            for name in sorted(self.shapes):
                value, own = self._tensors[name], self._state(name)
                if updates:
                    encoded, change = self._change(name, updates, own)
                    parts.append((name, self.shapes[name], encoded))
                    # One float32 addition, the one that every site repeats.
                    value = value + change
                checkpoint.put(name, value, **own)

            def update(target: str) -> Payload:
                return payload.pack_encoded(
                    parts,
                    kind="model",
                    codec=self._config.codec,
                    base=self.hash,
                    target=target,
                    frozen=self.frozen,
                )

            model = checkpoint.finish(federation, update if updates else None)
        path = round_directory(self._checkpoints, number)
        self.take_up(path, model)
        return path

    def _state(self, name: str) -> dict[str, Any]:
        if self._kept is None:
            return {state: np.zeros(self.shapes[name], np.float32) for state in self._states}
        return {state: self._kept[f"{state}.{name}"] for state in self._states}

    def _change(self, name: str, updates: Updates, own: dict[str, Any]) -> tuple[bytes, Any]:
        """The change of one tensor as it goes out, encoded and as every site will read it."""
        config = self._config
        mean = updates.mean(name, robust=config.robust, trim=config.trim)
        step = server_optimizer.step(config, mean, own)
        encoded, change, residual = payload.encode_feedback(step, own.get(_RESIDUAL), config.codec)
        if _RESIDUAL in own:
            own[_RESIDUAL] = residual
        return encoded, change
